//! Draws the chart as SVG.

use std::fmt::Write as _;

use crate::run::{Bin, CONFIGURED, FALLEN, FALLS_AT, Run, TRUE, per_second};

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 440.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 84.0;
const BOTTOM: f64 = 52.0;

const INK: &str = "#1f2933";
const QUIET: &str = "#7b8794";
const GRID: &str = "#e4e7eb";
const ACCEPTED: &str = "#3b82c4";
const REJECTED: &str = "#e0533d";
const LIMIT: &str = "#1f2933";

/// Converts seconds and calls per second to coordinates.
struct Paper {
    seconds: f64,
    top: f64,
}

impl Paper {
    fn x(&self, second: f64) -> f64 {
        LEFT + second / self.seconds * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, rate: f64) -> f64 {
        HEIGHT - BOTTOM - rate / self.top * (HEIGHT - TOP - BOTTOM)
    }

    /// Returns a path along the tops of `bins`.
    fn steps(&self, bins: &[Bin], value: impl Fn(&Bin) -> f64) -> String {
        let mut path = String::new();
        for bin in bins {
            let (from, to, y) = (self.x(bin.from), self.x(bin.to), self.y(value(bin)));
            let _ = write!(path, "L{from:.1} {y:.1}L{to:.1} {y:.1}");
        }
        path
    }

    fn area(&self, bins: &[Bin], value: impl Fn(&Bin) -> f64, fill: &str) -> String {
        let (from, floor, to) = (self.x(0.0), self.y(0.0), self.x(self.seconds));
        let steps = self.steps(bins, value);
        format!("<path fill=\"{fill}\" d=\"M{from:.1} {floor:.1}{steps}L{to:.1} {floor:.1}Z\"/>\n")
    }
}

/// Returns the whole file.
pub fn chart(run: &Run) -> String {
    let bins = run.bins(150);
    let peak = bins.iter().map(|bin| bin.granted).fold(0.0, f64::max);
    let paper = Paper {
        seconds: bins.last().map_or(1.0, |bin| bin.to),
        top: peak.max(per_second(CONFIGURED)) * 1.08,
    };
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"system-ui, 'DejaVu Sans', sans-serif\" font-size=\"12\" fill=\"{INK}\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#ffffff\"/>\n"
    );
    svg += &heading(run);
    svg += &grid(&paper);
    // A granted call is accepted or rejected, so the accepted area covers part of the granted one.
    svg += &paper.area(&bins, |bin| bin.granted, REJECTED);
    svg += &paper.area(&bins, |bin| bin.accepted, ACCEPTED);
    svg += &limits(&paper);
    svg += &ends(&paper, run);
    svg + "</svg>\n"
}

fn text(x: f64, y: f64, anchor: &str, style: &str, text: &str) -> String {
    format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" {style}>{text}</text>\n")
}

fn line(from: (f64, f64), to: (f64, f64), style: &str) -> String {
    format!(
        "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" {style}/>\n",
        from.0, from.1, to.0, to.1
    )
}

fn heading(run: &Run) -> String {
    let quiet = format!("fill=\"{QUIET}\"");
    let mut svg = text(
        LEFT,
        28.0,
        "start",
        "font-size=\"17\" font-weight=\"600\"",
        "Configured with twice the limit, which then falls to a quarter",
    );
    let sums = format!(
        "{} of {} calls answered in {:.0} s, {:.3} of the bound; {:.2} % of {} attempts rejected",
        run.answered,
        crate::run::CALLS,
        run.makespan.as_secs_f64(),
        run.ratio(),
        100.0 * run.rejected_share(),
        run.accepted + run.rejected,
    );
    svg += &text(LEFT, 48.0, "start", &quiet, &sums);
    let mut x = WIDTH - RIGHT - 190.0;
    for (fill, what) in [(ACCEPTED, "accepted"), (REJECTED, "rejected")] {
        let y = TOP - 22.0;
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"{y}\" width=\"11\" height=\"11\" rx=\"2\" fill=\"{fill}\"/>"
        );
        svg += &text(x + 17.0, y + 10.0, "start", "", what);
        x += 100.0;
    }
    svg + &text(LEFT, TOP - 12.0, "start", &quiet, "calls per second")
}

fn grid(paper: &Paper) -> String {
    let mut svg = String::new();
    let right = WIDTH - RIGHT;
    let style = format!("stroke=\"{GRID}\"");
    let quiet = format!("fill=\"{QUIET}\"");
    let mut rate = 0.0;
    while rate <= paper.top {
        let y = paper.y(rate);
        svg += &line((LEFT, y), (right, y), &style);
        svg += &text(LEFT - 8.0, y + 4.0, "end", &quiet, &format!("{rate:.0}"));
        rate += 5.0;
    }
    let floor = paper.y(0.0);
    let mut minute = 0.0;
    while minute * 60.0 <= paper.seconds {
        let x = paper.x(minute * 60.0);
        let tick = format!("stroke=\"{QUIET}\"");
        svg += &line((x, floor), (x, floor + 5.0), &tick);
        let label = format!("{minute:.0} min");
        svg += &text(x, floor + 20.0, "middle", &quiet, &label);
        minute += 1.0;
    }
    svg
}

/// Draws the true limit as a line with a step and the configured limit as a thin line.
fn limits(paper: &Paper) -> String {
    let falls = paper.x(FALLS_AT.as_secs_f64());
    let (left, right) = (paper.x(0.0), paper.x(paper.seconds));
    let (before, after) = (paper.y(per_second(TRUE)), paper.y(per_second(FALLEN)));
    let configured = paper.y(per_second(CONFIGURED));
    let thin = format!("stroke=\"{QUIET}\" stroke-dasharray=\"2 4\"");
    let mut svg = line((left, configured), (right, configured), &thin);
    let _ = writeln!(
        svg,
        "<path fill=\"none\" stroke=\"{LIMIT}\" stroke-width=\"2\" stroke-dasharray=\"7 4\" \
         d=\"M{left:.1} {before:.1}H{falls:.1}V{after:.1}H{right:.1}\"/>"
    );
    let quiet = format!("fill=\"{QUIET}\"");
    svg += &text(right, configured - 6.0, "end", &quiet, "configured");
    let name = "font-weight=\"600\"";
    svg + &text(falls + 8.0, before + 4.0, "start", name, "true limit")
}

/// Marks the bound and the end of the run.
fn ends(paper: &Paper, run: &Run) -> String {
    let (bound, end) = (run.bound.as_secs_f64(), run.makespan.as_secs_f64());
    let (top, floor) = (paper.y(per_second(TRUE)), paper.y(0.0));
    let mut svg = line(
        (paper.x(bound), top),
        (paper.x(bound), floor),
        &format!("stroke=\"{INK}\""),
    );
    let label = format!("bound {bound:.0} s");
    svg += &text(paper.x(bound) - 6.0, top + 10.0, "end", "", &label);
    svg += &line(
        (paper.x(end), top + 22.0),
        (paper.x(end), floor),
        &format!("stroke=\"{ACCEPTED}\""),
    );
    let blue = format!("fill=\"{ACCEPTED}\"");
    let label = format!("done {end:.0} s");
    svg + &text(paper.x(bound) - 6.0, top + 28.0, "end", &blue, &label)
}
