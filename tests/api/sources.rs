//! Reads the crate's own sources as a tree of modules, and finds the modules and items that a path names.
//!
//! Code under `#[cfg(test)]` is left out; nothing else is.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use syn::visit::Visit;
use syn::{Attribute, Item, UseTree};

/// The path of a module from the root of the crate, which is empty.
pub type ModulePath = Vec<String>;

/// A module with its items, macros of the crate not expanded.
pub struct Module {
    pub items: Vec<Item>,
    names: BTreeSet<String>,
    /// Each name that a `use` brings in, with the path it stands for; `*` for all names of a module.
    uses: Vec<(String, Vec<String>)>,
}

impl Module {
    fn new(items: Vec<Item>) -> Self {
        let mut uses = Vec::new();
        for item in &items {
            if let Item::Use(item) = item {
                flatten(&item.tree, &mut Vec::new(), &mut |name, path| {
                    uses.push((name.to_owned(), path.to_vec()));
                });
            }
        }
        let names = items.iter().filter_map(ident).map(syn::Ident::to_string);
        let names = names.chain(made_by_macros(&items)).collect();
        Self { items, names, uses }
    }

    fn defines(&self, name: &str) -> bool {
        self.names.contains(name)
    }
}

/// All modules of a crate.
#[derive(Default)]
pub struct Crate {
    pub modules: BTreeMap<ModulePath, Module>,
}

impl Crate {
    /// Reads `lib.rs` in `src` and all modules that it declares.
    pub fn read(src: &Path) -> Self {
        let mut sources = Self::default();
        sources.read_file(&src.join("lib.rs"), src, Vec::new());
        sources
    }

    /// Makes a crate of modules that are given as text, the root under the empty path.
    pub fn from_text(modules: &[(&str, &str)]) -> Self {
        let mut sources = Self::default();
        for (path, text) in modules {
            let path = path.split("::").filter(|name| !name.is_empty());
            let items = syn::parse_file(text).unwrap().items;
            sources.add(path.map(str::to_owned).collect(), items);
        }
        sources
    }

    /// `folder` holds the children of the module in `file`.
    fn read_file(&mut self, file: &Path, folder: &Path, path: ModulePath) {
        let text = fs::read_to_string(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        let parsed = syn::parse_file(&text).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        for item in &parsed.items {
            if let Item::Mod(module) = item
                && module.content.is_none()
                && !is_test(&module.attrs)
            {
                let name = module.ident.to_string();
                let inside = folder.join(&name);
                let beside = folder.join(format!("{name}.rs"));
                let child = match beside.is_file() {
                    true => beside,
                    false => inside.join("mod.rs"),
                };
                self.read_file(&child, &inside, child_of(&path, &name));
            }
        }
        self.add(path, parsed.items);
    }

    fn add(&mut self, path: ModulePath, mut items: Vec<Item>) {
        items.retain(|item| !is_test(attributes(item)));
        for item in &mut items {
            if let Item::Mod(module) = item
                && let Some((_, inner)) = &mut module.content
            {
                let name = module.ident.to_string();
                self.add(child_of(&path, &name), std::mem::take(inner));
            }
        }
        self.modules.insert(path, Module::new(items));
    }

    /// The modules that a path written in `module` names: the last one that is spelled out and, where the name is a
    /// re-export, the one that defines it. None for paths into other crates and for local names.
    pub fn targets(&self, module: &ModulePath, path: &[String]) -> BTreeSet<ModulePath> {
        let mut targets = BTreeSet::new();
        self.follow(module, path, &mut targets, 0);
        targets
    }

    /// The module that defines the item which `path` names in `module`, and the item's name there.
    pub fn definition(&self, module: &ModulePath, path: &[String]) -> Option<(ModulePath, String)> {
        self.follow(module, path, &mut BTreeSet::new(), 0)
    }

    fn follow(
        &self,
        module: &ModulePath,
        path: &[String],
        targets: &mut BTreeSet<ModulePath>,
        depth: usize,
    ) -> Option<(ModulePath, String)> {
        // A name that is defined by itself, as in `pub use self::x::*` both ways.
        if depth > 20 {
            return None;
        }
        let (mut at, mut rest) = match path.first()?.as_str() {
            "crate" => (Vec::new(), &path[1..]),
            "self" => (module.clone(), &path[1..]),
            _ => (module.clone(), path),
        };
        let is_explicit = matches!(path[0].as_str(), "crate" | "self" | "super");
        while rest.first().is_some_and(|name| name == "super") {
            at.pop().expect("`super` of the root");
            rest = &rest[1..];
        }
        while let Some(name) = rest.first() {
            let child = child_of(&at, name);
            let is_name_alone = rest.len() == 1 && self.modules.get(&at)?.defines(name);
            if !self.modules.contains_key(&child) || is_name_alone {
                break;
            }
            at = child;
            rest = &rest[1..];
        }
        if is_explicit || at != *module {
            targets.insert(at.clone());
        }
        let (name, further) = rest.split_first()?;
        let here = self.modules.get(&at)?;
        if here.defines(name) {
            return Some((at, name.clone()));
        }
        for (imported, target) in &here.uses {
            let mut target = match imported.as_str() {
                "*" => [target, std::slice::from_ref(name)].concat(),
                imported if imported == name => target.clone(),
                _ => continue,
            };
            target.extend_from_slice(further);
            let mut found = BTreeSet::new();
            if let Some(definition) = self.follow(&at, &target, &mut found, depth + 1) {
                // A name that is only local to this module is followed from its own `use`.
                if is_explicit || at != *module {
                    targets.insert(definition.0.clone());
                }
                return Some(definition);
            }
        }
        None
    }
}

pub fn child_of(module: &ModulePath, name: &str) -> ModulePath {
    let mut path = module.clone();
    path.push(name.to_owned());
    path
}

/// Whether code with these attributes is compiled for unit tests only: `#[cfg(test)]` or `#[cfg(all(test, ...))]`.
pub fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let mut found = false;
        if attribute.path().is_ident("cfg") {
            let _ = attribute.parse_nested_meta(|meta| {
                found |= meta.path.is_ident("test");
                if meta.path.is_ident("all") {
                    let _ = meta.parse_nested_meta(|meta| {
                        found |= meta.path.is_ident("test");
                        skip(&meta)
                    });
                    return Ok(());
                }
                skip(&meta)
            });
        }
        found
    })
}

/// Reads over the value or the list of one part of an attribute.
fn skip(meta: &syn::meta::ParseNestedMeta<'_>) -> syn::Result<()> {
    if meta.input.peek(syn::Token![=]) {
        meta.value()?.parse::<syn::Lit>()?;
    } else if meta.input.peek(syn::token::Paren) {
        let inner;
        syn::parenthesized!(inner in meta.input);
        inner.parse::<proc_macro2::TokenStream>()?;
    }
    Ok(())
}

/// Calls `leaf` with each name that a `use` brings in and the path it stands for.
pub fn flatten(tree: &UseTree, path: &mut Vec<String>, leaf: &mut impl FnMut(&str, &[String])) {
    match tree {
        UseTree::Path(part) => {
            path.push(part.ident.to_string());
            flatten(&part.tree, path, leaf);
            path.pop();
        }
        UseTree::Group(group) => {
            for tree in &group.items {
                flatten(tree, path, leaf);
            }
        }
        UseTree::Glob(_) => leaf("*", path),
        UseTree::Name(name) if name.ident == "self" => {
            let module = path.last().cloned().unwrap_or_default();
            leaf(&module, path);
        }
        UseTree::Name(name) => {
            path.push(name.ident.to_string());
            leaf(&name.ident.to_string(), path);
            path.pop();
        }
        UseTree::Rename(name) => {
            path.push(name.ident.to_string());
            leaf(&name.rename.to_string(), path);
            path.pop();
        }
    }
}

pub fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

/// The macro that `call` calls, if it is defined among `items`.
pub fn macro_of<'a>(items: &'a [Item], call: &syn::ItemMacro) -> Option<&'a syn::ItemMacro> {
    let name = call.mac.path.get_ident().filter(|_| call.ident.is_none())?;
    let mut macros = items.iter().filter_map(|item| match item {
        Item::Macro(item) => Some(item),
        _ => None,
    });
    macros.find(|item| item.ident.as_ref() == Some(name))
}

/// The names of items that are spelled out in a macro which the same module defines and calls.
fn made_by_macros(items: &[Item]) -> Vec<String> {
    let calls = items.iter().filter_map(|item| match item {
        Item::Macro(call) => macro_of(items, call),
        _ => None,
    });
    calls.flat_map(names_made_by).collect()
}

/// The names of the structs, enums and traits that a macro spells out.
pub fn names_made_by(item: &syn::ItemMacro) -> Vec<String> {
    let text = item.mac.tokens.to_string();
    let words: Vec<_> = text.split_whitespace().collect();
    let pairs = words.windows(2);
    let names = pairs.filter(|pair| matches!(pair[0], "struct" | "enum" | "trait"));
    let names = names.map(|pair| pair[1].split('<').next().unwrap_or_default());
    let names = names.filter(|name| name.starts_with(char::is_alphabetic));
    names.map(str::to_owned).collect()
}

/// The name of an item; none for imports, implementations and submodules.
pub fn ident(item: &Item) -> Option<&syn::Ident> {
    match item {
        Item::Const(item) => Some(&item.ident),
        Item::Enum(item) => Some(&item.ident),
        Item::Fn(item) => Some(&item.sig.ident),
        Item::Macro(item) => item.ident.as_ref(),
        Item::Static(item) => Some(&item.ident),
        Item::Struct(item) => Some(&item.ident),
        Item::Trait(item) => Some(&item.ident),
        Item::Type(item) => Some(&item.ident),
        _ => None,
    }
}

/// All paths that the code of one module writes, in imports, code, attributes and macros.
pub fn paths(module: &Module) -> Vec<Vec<String>> {
    let mut paths = Paths(Vec::new());
    for item in &module.items {
        paths.visit_item(item);
    }
    paths.0
}

struct Paths(Vec<Vec<String>>);

impl Paths {
    /// Adds the paths in tokens that are not parsed: those that begin with `crate`, `self` or `super`, or that have
    /// at least two names.
    fn tokens(&mut self, tokens: proc_macro2::TokenStream, prefix: &[String]) {
        use proc_macro2::{Delimiter, TokenTree};
        let mut tokens = tokens.into_iter().peekable();
        let mut path = prefix.to_vec();
        let mut is_open = !prefix.is_empty();
        while let Some(token) = tokens.next() {
            match token {
                TokenTree::Ident(name) => {
                    if !is_open {
                        self.end(&mut path, prefix);
                    }
                    path.push(name.to_string());
                    is_open = false;
                }
                TokenTree::Punct(colon) if colon.as_char() == ':' => {
                    let is_double = matches!(tokens.peek(), Some(TokenTree::Punct(next)) if next.as_char() == ':');
                    if is_double {
                        tokens.next();
                        is_open = true;
                    } else {
                        self.end(&mut path, prefix);
                    }
                }
                TokenTree::Group(group) => {
                    if is_open && group.delimiter() == Delimiter::Brace {
                        let inner = std::mem::replace(&mut path, prefix.to_vec());
                        self.tokens(group.stream(), &inner);
                    } else {
                        self.end(&mut path, prefix);
                        self.tokens(group.stream(), &[]);
                    }
                    is_open = !prefix.is_empty();
                }
                TokenTree::Literal(literal) => {
                    self.end(&mut path, prefix);
                    let text = literal.to_string();
                    let text = text.trim_matches('"');
                    if ["crate::", "self::", "super::"]
                        .iter()
                        .any(|s| text.starts_with(s))
                    {
                        self.0.push(text.split("::").map(str::to_owned).collect());
                    }
                    is_open = !prefix.is_empty();
                }
                TokenTree::Punct(_) => {
                    self.end(&mut path, prefix);
                    is_open = !prefix.is_empty();
                }
            }
        }
        self.end(&mut path, prefix);
    }

    fn end(&mut self, path: &mut Vec<String>, prefix: &[String]) {
        if path.len() > 1 && path.len() > prefix.len() {
            self.0.push(path.clone());
        }
        *path = prefix.to_vec();
    }
}

impl<'ast> Visit<'ast> for Paths {
    fn visit_item(&mut self, item: &'ast Item) {
        // Modules are read by themselves.
        if !is_test(attributes(item)) && !matches!(item, Item::Mod(_)) {
            syn::visit::visit_item(self, item);
        }
    }

    fn visit_impl_item(&mut self, item: &'ast syn::ImplItem) {
        let attributes: &[Attribute] = match item {
            syn::ImplItem::Const(item) => &item.attrs,
            syn::ImplItem::Fn(item) => &item.attrs,
            syn::ImplItem::Type(item) => &item.attrs,
            _ => &[],
        };
        if !is_test(attributes) {
            syn::visit::visit_impl_item(self, item);
        }
    }

    fn visit_field(&mut self, field: &'ast syn::Field) {
        if !is_test(&field.attrs) {
            syn::visit::visit_field(self, field);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        flatten(&item.tree, &mut Vec::new(), &mut |_, path| {
            self.0.push(path.to_vec());
        });
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let names = path.segments.iter().map(|part| part.ident.to_string());
        let names: Vec<_> = names.collect();
        if names.len() > 1 {
            self.0.push(names);
        }
        syn::visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        self.visit_path(&call.path);
        self.tokens(call.tokens.clone(), &[]);
    }

    fn visit_attribute(&mut self, attribute: &'ast Attribute) {
        if let syn::Meta::List(list) = &attribute.meta {
            self.tokens(list.tokens.clone(), &[]);
        }
    }

    // `pub(in crate::x)` imports nothing.
    fn visit_visibility(&mut self, _: &'ast syn::Visibility) {}
}
