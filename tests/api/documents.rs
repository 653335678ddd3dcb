//! The documents name files that exist.

use std::path::Path;

#[test]
fn every_path_that_a_document_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let documents = [
        "README.md",
        "CONTRIBUTING.md",
        "DESIGN.md",
        "src/tutorial.md",
    ];
    let mut missing = Vec::new();
    let mut found = 0;
    for document in documents {
        let text = std::fs::read_to_string(root.join(document)).unwrap();
        let quoted = text.split('`').skip(1).step_by(2);
        let folders = ["src/", "tests/", "examples/", "benches/"];
        let paths = quoted.filter(|text| folders.iter().any(|folder| text.starts_with(folder)));
        for path in paths.filter(|path| !path.contains([' ', '\n'])) {
            found += 1;
            if !root.join(path).exists() {
                missing.push(format!("{document}: {path}"));
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
    assert!(found > 30, "only {found} paths were found");
}
