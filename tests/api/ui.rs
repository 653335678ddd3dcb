//! The compiler errors of common mistakes name the remedy.
//!
//! Each file of `tests/ui` is compiled by `rustc` against the library that this test itself is linked with, so nothing
//! else is built. The lines that start with `//~ ` must all be in the compiler's output, and it must report one error;
//! a file without such a line must compile. Only words of this crate are listed, because those of the compiler change
//! with its version.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The library in the folder of this test's executable: the newest one that is older than the executable, because
/// builds with other features and profiles leave theirs there too.
fn library(executable: &Path) -> PathBuf {
    let modified = |path: &Path| fs::metadata(path).unwrap().modified().unwrap();
    let linked = modified(executable);
    let folder = executable.parent().unwrap();
    let is_library = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy();
        name.starts_with("libthroughline-") && name.ends_with(".rlib") && modified(path) <= linked
    };
    let files = fs::read_dir(folder).unwrap();
    let files = files.map(|file| file.unwrap().path());
    files
        .filter(is_library)
        .max_by_key(|path| modified(path))
        .unwrap_or_else(|| panic!("no libthroughline-*.rlib beside {}", executable.display()))
}

/// Checks one file with the compiler. Returns whether it compiles, and the compiler's output.
fn compile(case: &Path, library: &Path) -> (bool, String) {
    let dependencies = library.parent().unwrap();
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(&rustc)
        .args([
            "--edition=2024",
            "--crate-type=bin",
            "--emit=metadata",
            "--color=never",
        ])
        .args(["--out-dir", env!("CARGO_TARGET_TMPDIR")])
        .arg(format!("-Ldependency={}", dependencies.display()))
        .arg(format!("--extern=throughline={}", library.display()))
        .arg(case)
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}", rustc.display()));
    let text = String::from_utf8(output.stderr).unwrap();
    (output.status.success(), text)
}

/// Compares the compiler's output with the expectations in the file.
fn complaint(source: &str, compiles: bool, output: &str) -> Option<String> {
    let expected: Vec<_> = source
        .lines()
        .filter_map(|line| line.strip_prefix("//~ "))
        .collect();
    if compiles != expected.is_empty() {
        let verdict = if compiles {
            "compiles"
        } else {
            "does not compile"
        };
        return Some(format!("it {verdict}"));
    }
    let errors = output
        .lines()
        .filter(|line| line.starts_with("error") && !line.starts_with("error: aborting"));
    let errors = errors.count();
    if errors != usize::from(!compiles) {
        return Some(format!("it has {errors} errors"));
    }
    let missing = expected.iter().find(|words| !output.contains(**words));
    missing.map(|words| format!("no line says `{words}`"))
}

#[test]
fn a_common_mistake_gives_one_error_that_names_the_remedy() {
    let library = library(&env::current_exe().unwrap());
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/ui");
    let mut mistakes = 0;
    for file in fs::read_dir(folder).unwrap() {
        let case = file.unwrap().path();
        let source = fs::read_to_string(&case).unwrap();
        let (compiles, output) = compile(&case, &library);
        if let Some(complaint) = complaint(&source, compiles, &output) {
            panic!("{}: {complaint}\n\n{output}", case.display());
        }
        mistakes += usize::from(!compiles);
    }
    assert!(mistakes >= 2, "only {mistakes} files do not compile");
}

#[test]
fn an_unexpected_answer_is_reported() {
    let source = "//~ say this\nfn main() {}\n";
    let output = "error[E0277]: say this\nerror: aborting due to 1 previous error\n";
    assert_eq!(complaint(source, false, output), None);
    assert_eq!(complaint("fn main() {}\n", true, "warning: unused\n"), None);
    for (source, compiles, output) in [
        (source, true, ""),
        (source, false, "error[E0277]: say that\n"),
        (
            source,
            false,
            "error[E0277]: say this\nerror[E0308]: and that\n",
        ),
        ("fn main() {}\n", false, "error[E0277]: say this\n"),
    ] {
        assert!(complaint(source, compiles, output).is_some(), "{output}");
    }
}
