//! Imports go down the table of layers in `DESIGN.md`, and no two modules import each other.
//!
//! The test reads all code under `src` except for items under `#[cfg(test)]`. A path counts for the module that it spells
//! out and for the one that defines the name, so a re-export hides nothing. A module and those inside it may import
//! each other. The test does not see calls of methods whose type is not named.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use crate::sources::{self, Crate, ModulePath};

/// Each module of the root, the highest first: the first column of the table under "Layers".
fn layers(design: &str) -> Vec<String> {
    let table = design
        .lines()
        .skip_while(|line| *line != "## Layers")
        .skip(1);
    let rows = table
        .take_while(|line| !line.starts_with("## "))
        .filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
    rows.map(|(module, _)| module.to_owned()).collect()
}

/// The pairs of modules of which the first imports the second and neither is inside the other, with an importing path.
fn imports(sources: &Crate) -> BTreeMap<(ModulePath, ModulePath), String> {
    let mut imports = BTreeMap::new();
    for (importer, module) in &sources.modules {
        for path in sources::paths(module) {
            for imported in sources.targets(importer, &path) {
                if !importer.starts_with(&imported) && !imported.starts_with(importer) {
                    imports.insert((importer.clone(), imported), path.join("::"));
                }
            }
        }
    }
    imports
}

/// The violations of the rules, each with the imports that cause it.
fn violations(sources: &Crate, layers: &[String]) -> BTreeMap<String, Vec<String>> {
    let mut wrong = BTreeMap::<String, Vec<String>>::new();
    let layer = |module: &str| layers.iter().position(|layer| layer == module);
    for (module, content) in sources.modules.iter().filter(|(path, _)| path.len() == 1) {
        // Modules of documentation alone import nothing.
        if layer(&module[0]).is_none() && !content.items.is_empty() {
            let problem = format!("`{}` has no row in the table", module[0]);
            wrong.entry(problem).or_default();
        }
    }
    for module in layers {
        if !sources.modules.contains_key(&vec![module.clone()]) {
            let problem = format!("`{module}` has a row in the table and is no module");
            wrong.entry(problem).or_default();
        }
    }

    // The modules directly inside each module, and which of them, with all inside, imports which.
    let mut siblings = BTreeMap::<&[String], BTreeMap<&str, BTreeSet<&str>>>::new();
    let imports = imports(sources);
    for ((importer, imported), path) in &imports {
        let common = importer.iter().zip(imported).take_while(|(a, b)| a == b);
        let common = common.count();
        let (from, to) = (&importer[common], &imported[common]);
        if common > 0 {
            let inside = siblings.entry(&importer[..common]).or_default();
            inside.entry(from).or_default().insert(to);
        } else if layer(from) >= layer(to) {
            let import = format!("{}: {path}", importer.join("::"));
            let problem = format!("`{from}` imports `{to}`");
            wrong.entry(problem).or_default().push(import);
        }
    }

    for (parent, edges) in &siblings {
        for cycle in cycles(edges) {
            let names: Vec<_> = cycle.iter().map(|name| format!("`{name}`")).collect();
            let within = |module: &ModulePath| {
                module.starts_with(parent) && cycle.contains(module[parent.len()].as_str())
            };
            let part = imports.iter().filter(|((from, to), _)| {
                within(from) && within(to) && from[parent.len()] != to[parent.len()]
            });
            let part = part.map(|((from, _), path)| format!("{}: {path}", from.join("::")));
            let problem = format!("cycle in `{}`: {}", parent.join("::"), names.join(", "));
            wrong.insert(problem, part.collect());
        }
    }
    wrong
}

/// The largest sets of modules that all import each other, directly or through others.
fn cycles<'a>(edges: &BTreeMap<&'a str, BTreeSet<&'a str>>) -> BTreeSet<BTreeSet<&'a str>> {
    let reached = |from: &'a str| {
        let (mut reached, mut open) = (BTreeSet::new(), vec![from]);
        while let Some(next) = open.pop() {
            let further = edges.get(next).into_iter().flatten();
            open.extend(further.filter(|further| reached.insert(**further)));
        }
        reached
    };
    let all: BTreeMap<_, _> = edges.keys().map(|from| (*from, reached(from))).collect();
    let cycle = |from: &&'a str| {
        let both = all[from].iter().copied();
        both.filter(|to| all.get(to).is_some_and(|back| back.contains(from)))
            .collect::<BTreeSet<_>>()
    };
    all.keys()
        .map(cycle)
        .filter(|cycle| cycle.len() > 1)
        .collect()
}

#[test]
fn imports_go_down_the_table_and_never_in_a_circle() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let sources = Crate::read(&root.join("src"));
    let layers = layers(&fs::read_to_string(root.join("DESIGN.md")).unwrap());
    assert!(
        sources.modules.len() > 60,
        "only {} modules found",
        sources.modules.len()
    );
    let wrong = violations(&sources, &layers);
    let list = |(problem, paths): (&String, &Vec<String>)| {
        format!("{problem}\n    {}", paths.join("\n    "))
    };
    let list: Vec<_> = wrong.iter().map(list).collect();
    assert!(wrong.is_empty(), "\n{}", list.join("\n"));
}

/// The problems of a crate of the modules `low`, `high` and `high::part`, each with this code.
fn problems(low: &str, high: &str, part: &str) -> Vec<String> {
    let root = "mod low; mod high; pub use high::High;";
    let modules = [
        ("", root),
        ("low", low),
        ("high", high),
        ("high::part", part),
    ];
    let layers = ["high", "low"].map(str::to_owned);
    violations(&Crate::from_text(&modules), &layers)
        .into_keys()
        .collect()
}

const LOW: &str = "pub struct Low;";
const HIGH: &str = "mod part; pub use self::part::Part; pub struct High;";

#[test]
fn an_import_upwards_is_found_however_it_is_written() {
    for code in [
        "use crate::high::High;",
        "use crate::high::{self, High};",
        "use super::high::*;",
        "use crate::High;",
        "use crate::high::part::Part;",
        "fn f() { let _ = crate::high::High; }",
        "fn f() { use crate::high; }",
        "fn f() -> super::high::High { todo!() }",
        "fn f() { println!(\"{:?}\", crate::high::High); }",
        "macro_rules! m { () => { $crate::high::High }; }",
        "macro_rules! m { () => { use $crate::{low::Low, high::High}; }; }",
        "#[derive(Serialize)] struct S { #[serde(with = \"crate::high::part\")] s: u8 }",
        "#[cfg(not(test))] use crate::high::High;",
        "#[cfg(test)] mod tests { } use crate::high::High;",
        "mod inner { use super::super::high::High; }",
    ] {
        let found = problems(code, HIGH, "pub struct Part;");
        assert_eq!(found, ["`low` imports `high`"], "{code}");
    }
}

#[test]
fn code_for_tests_and_comments_and_downward_imports_are_allowed() {
    for code in [
        "#[cfg(test)] use crate::high::High;",
        "#[cfg(all(test, feature = \"x\"))] mod tests { use crate::high::High; }",
        "struct S; impl S { #[cfg(test)] fn f() { crate::high::f(); } }",
        "/// See [`High`](crate::high::High).\nstruct S;",
        "pub(in crate::high) fn f() {}",
        "use high::High; // a crate of that name",
    ] {
        let found = problems(code, HIGH, "pub struct Part;");
        assert!(found.is_empty(), "{code}: {found:?}");
    }
    let high = format!("{HIGH} use crate::low::Low; use part::Part as P;");
    let part = "use super::High; pub struct Part; use crate::low;";
    assert!(problems(LOW, &high, part).is_empty());
}

#[test]
fn a_circle_of_modules_is_found_through_the_re_exports_of_their_parent() {
    let parent = "mod a; mod b; mod c; pub use self::a::A; pub use self::b::B; pub use self::c::*;";
    let modules = [
        ("", "mod p;"),
        ("p", parent),
        ("p::a", "use super::B; pub struct A;"),
        ("p::b", "use crate::p::C; pub struct B;"),
        ("p::c", "pub struct C; fn f(_: super::a::A) {}"),
    ];
    let layers = ["p".to_owned()];
    let wrong = violations(&Crate::from_text(&modules), &layers);
    let found: Vec<_> = wrong.keys().collect();
    assert_eq!(found, ["cycle in `p`: `a`, `b`, `c`"], "{wrong:?}");
    let paths: Vec<_> = wrong.values().flatten().collect();
    assert_eq!(
        paths,
        ["p::a: super::B", "p::b: crate::p::C", "p::c: super::a::A"]
    );
}

#[test]
fn a_module_without_a_row_and_a_row_without_a_module_are_found() {
    let wrong = violations(
        &Crate::from_text(&[("", ""), ("attic", "fn f() {}")]),
        &["cellar".to_owned()],
    );
    let found: Vec<_> = wrong.into_keys().collect();
    assert_eq!(
        found,
        [
            "`attic` has no row in the table",
            "`cellar` has a row in the table and is no module"
        ]
    );
}

#[test]
fn the_layers_are_the_first_column_of_the_table() {
    let design = "## Why\n| `x` | |\n## Layers\n\n| module | |\n|---|---|\n| `a` | `b` |\n| `c` | |\n\n## Next\n| `d` | |\n";
    assert_eq!(layers(design), ["a", "c"]);
}
