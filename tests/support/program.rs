//! The examples as programs.

use std::path::PathBuf;

/// Cargo builds the examples before it runs the tests, beside them.
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

/// Whether the long forms of the tests are asked for, with `THROUGHLINE_LONG=1`.
pub fn is_long() -> bool {
    std::env::var_os("THROUGHLINE_LONG").is_some_and(|value| value == "1")
}
