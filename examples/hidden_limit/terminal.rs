//! Draws the chart for a terminal, about a hundred columns wide.

use std::fmt::{self, Write as _};
use std::io::IsTerminal as _;

use crate::run::{Bin, CONFIGURED, FALLEN, Run, limit_at, per_second};

const COLUMNS: usize = 96;
/// Calls per second of a row, chosen so that every limit is at the edge of a row.
const ROW: f64 = FALLEN as f64 / 60.0 / 2.0;
const EIGHTHS: [char; 8] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇'];

const ACCEPTED: &str = "36";
const REJECTED: &str = "31";
const LIMIT: &str = "33";
const QUIET: &str = "90";

pub struct Chart<'a>(pub &'a Run);

impl fmt::Display for Chart<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let paint = Paint(std::io::stdout().is_terminal());
        let bins = self.0.bins(COLUMNS);
        let top = bins.iter().map(|bin| bin.granted.max(bin.accepted));
        let top = top.fold(per_second(CONFIGURED), f64::max);
        let rows = (top / ROW).ceil() as usize + 1;

        writeln!(f, "calls per second")?;
        for row in (0..rows).rev() {
            let label = row as f64 * ROW;
            // Zero is on the axis below.
            if row > 0 && label % 5.0 == 0.0 {
                write!(f, "{label:>4.0} ┤")?;
            } else {
                f.write_str("     │")?;
            }
            for bin in &bins {
                let (color, glyph) = cell(bin, row);
                paint.write(f, color, glyph)?;
            }
            writeln!(f)?;
        }
        axis(f, &bins, self.0)?;
        write!(f, "      ")?;
        for (color, glyph, what) in [
            (ACCEPTED, '█', "accepted"),
            (REJECTED, '▒', "rejected (granted = both)"),
            (LIMIT, '▁', "true limit"),
            (QUIET, '▁', "configured"),
        ] {
            paint.write(f, color, glyph)?;
            write!(f, " {what}   ")?;
        }
        writeln!(f, "^ bound")
    }
}

/// Returns the colour and character in the column of `bin`, `row` rows above the axis.
fn cell(bin: &Bin, row: usize) -> (&'static str, char) {
    let floor = row as f64 * ROW;
    let filled = |value: f64| ((value - floor) / ROW).clamp(0.0, 1.0);
    let (accepted, granted) = (filled(bin.accepted), filled(bin.accepted + bin.rejected));
    let line = |limit: f64| (limit - floor).abs() < ROW / 2.0;
    if accepted >= 15.0 / 16.0 {
        (ACCEPTED, '█')
    } else if granted - accepted > 0.25 {
        (REJECTED, '▒')
    } else if accepted >= 1.0 / 16.0 {
        (
            ACCEPTED,
            EIGHTHS[(accepted * 8.0).round().min(7.0) as usize],
        )
    } else if line(limit_at(bin.from)) {
        (LIMIT, '▁')
    } else if line(per_second(CONFIGURED)) {
        (QUIET, '▁')
    } else {
        (QUIET, ' ')
    }
}

/// Draws the time axis with the bound.
fn axis(f: &mut fmt::Formatter<'_>, bins: &[Bin], run: &Run) -> fmt::Result {
    let mut line = String::from("   0 ┼");
    let mut times = String::new();
    for bin in bins {
        let minute = (bin.from / 60.0).ceil();
        let tick = minute * 60.0 < bin.to;
        let bound = (bin.from..bin.to).contains(&run.bound.as_secs_f64());
        if tick {
            let gap = line.chars().count().saturating_sub(times.chars().count());
            write!(times, "{:gap$}{minute:.0} min", "")?;
        }
        line.push(match (bound, tick) {
            (true, _) => '^',
            (_, true) => '┴',
            _ => '─',
        });
    }
    writeln!(f, "{line}\n{times}")
}

/// Writes colours if the output is a terminal.
struct Paint(bool);

impl Paint {
    fn write(&self, f: &mut fmt::Formatter<'_>, color: &str, glyph: char) -> fmt::Result {
        if self.0 && glyph != ' ' {
            write!(f, "\x1b[{color}m{glyph}\x1b[0m")
        } else {
            f.write_char(glyph)
        }
    }
}
