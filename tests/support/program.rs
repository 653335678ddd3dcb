//! Finds the executables of the examples.
#![allow(dead_code)] // Not every set of features has a test that uses it.

use std::path::PathBuf;

/// Returns the executable of an example. Cargo builds the examples before it runs the tests.
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let program = test.ancestors().nth(2).unwrap().join("examples").join(name);
    assert!(
        program.is_file(),
        "\n\n{} IS MISSING: build it with `cargo build --example {name} --all-features`\n\
         (`cargo test --all-features` does that by itself; one test alone does not)\n",
        program.display()
    );
    program
}
