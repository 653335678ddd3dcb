//! Measures the cells on as many threads as there are, and prints them.

use std::fmt;

use crate::ablation::{self, Figures};
use crate::cell::Cell;
use crate::run::{Measured, measure};

/// A cell and its runs, one for each seed.
pub struct Row {
    cell: Cell,
    runs: Vec<Measured>,
}

/// Each run has its own clock, so they may share the machine.
pub fn measured(cells: Vec<Cell>) -> Vec<Row> {
    let runs = ablation::in_parallel(cells.len(), |index| {
        let cell = &cells[index];
        (1..=cell.seeds).map(|seed| measure(cell, seed)).collect()
    });
    let rows = cells.into_iter().zip(runs);
    rows.map(|(cell, runs)| Row { cell, runs }).collect()
}

/// Measures the cells with and without each policy, and prints what each policy is worth.
pub fn print_ablation(cells: &[Cell]) {
    let names: Vec<_> = cells
        .iter()
        .map(|cell| format!("{} {}", cell.scenario, configured(cell)))
        .collect();
    ablation::print(&names, |index, without| {
        let cell = cells[index].clone().with(|cell| cell.without = without);
        figures(&cell)
    });
}

/// The figures of a cell, over its seeds.
pub fn figures(cell: &Cell) -> Figures {
    Figures::mean((1..=cell.seeds).map(|seed| {
        let run = measure(cell, seed);
        Figures {
            ratio: run.ratio(),
            refused: run.rejected_share(),
        }
    }))
}

impl Row {
    /// The run that is worst by `figure`.
    fn worst_by(&self, figure: impl Fn(&Measured) -> f64) -> &Measured {
        let by_figure = |a: &&Measured, b: &&Measured| figure(a).total_cmp(&figure(b));
        self.runs.iter().max_by(by_figure).expect("a seed")
    }

    /// Which bars it misses, each in the run that is worst by it.
    pub fn misses(&self) -> Option<String> {
        let worst = [
            self.worst_by(Measured::ratio),
            self.worst_by(Measured::rejected_share),
            self.worst_by(|run| run.lost as f64),
            self.worst_by(|run| run.longest.as_secs_f64() / run.longest_queue.as_secs_f64()),
            self.worst_by(|run| f64::from(u8::from(run.above_limit.is_some()))),
        ];
        let misses = worst.iter().enumerate();
        let misses: Vec<String> = misses
            .filter_map(|(bar, run)| run.misses()[bar].clone())
            .collect();
        (!misses.is_empty()).then(|| {
            let (scenario, configured) = (self.cell.scenario, configured(&self.cell));
            format!("{scenario} at {configured}: {}", misses.join(", "))
        })
    }
}

fn configured(cell: &Cell) -> String {
    let share = cell.configured;
    let share = share.map_or_else(|| "-".into(), |share| format!("{share}x"));
    let default = if cell.burst.is_none() { "~" } else { "" };
    share + default
}

/// All rows, and what a `*` stands for.
pub struct Table<'a>(pub &'a [Row]);

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\n{:<28} {:>5} {:>11} {:>11} {:>6} {:>9} {:>9} {:>5} {:>11}",
            "scenario",
            "conf.",
            "makespan s",
            "bound s",
            "ratio",
            "attempts",
            "rejected",
            "lost",
            "longest s"
        )?;
        for row in self.0 {
            let worst = row.worst_by(Measured::ratio);
            let runs = || row.runs.iter();
            let rejected = runs().map(Measured::rejected_share).fold(0.0, f64::max);
            writeln!(
                f,
                "{:<24} {:>5} {:>11.1} {:>11.1} {:>6.3} {:>9} {:>7.2} % {:>5} {:>11.1}{}",
                row.cell.scenario,
                configured(&row.cell),
                worst.makespan.as_secs_f64(),
                worst.bound.as_secs_f64(),
                worst.ratio(),
                worst.attempts,
                100.0 * rejected,
                runs().map(|run| run.lost).max().unwrap_or(0),
                runs()
                    .map(|run| run.longest.as_secs_f64())
                    .fold(0.0, f64::max),
                if row.misses().is_some() { "  *" } else { "" },
            )?;
        }
        write!(
            f,
            "~ the burst is not set, but learned\n* misses its bars: the cell's ratio and share of rejected calls, none lost"
        )
    }
}
