//! The public API as text, so that a change of it shows in the diff of `tests/api/public_api.txt`.
//!
//! `UPDATE_PUBLIC_API=1 cargo test --test api public_api` writes that file anew.
//!
//! The text is made from the sources, for all features, because rustdoc's list of items leaves out signatures on stable
//! Rust and needs a build of its own. Macros with one arm and plain arguments are expanded; calls of the others are
//! listed as they are written.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use proc_macro2::{TokenStream, TokenTree};
use quote::ToTokens;
use syn::{Attribute, FnArg, ImplItem, Item, Pat, TraitItem, Type, Visibility};

use crate::sources::{self, Crate, ModulePath};

/// The module and the name of an item.
type Definition = (ModulePath, String);

/// The items of the public API.
#[derive(Default)]
struct Api {
    /// The public paths of each item.
    names: BTreeMap<Definition, BTreeSet<String>>,
    /// Modules, and items of other crates that are exported.
    others: BTreeSet<String>,
    /// Lines of methods and trait implementations, under the item they belong to.
    members: BTreeMap<Definition, BTreeMap<String, Vec<String>>>,
}

impl Api {
    fn of(sources: &Crate) -> Self {
        let mut api = Self::default();
        let mut sources_of_macros = Vec::new();
        for (path, module) in &sources.modules {
            for item in &module.items {
                if let Item::Macro(call) = item
                    && let Some(expanded) = expand(sources, &call.mac)
                {
                    let items = syn::parse2::<syn::File>(expanded).unwrap().items;
                    sources_of_macros.push((path, items));
                }
            }
        }
        let items = sources
            .modules
            .iter()
            .map(|(path, module)| (path, &module.items));
        let expanded = sources_of_macros.iter().map(|(path, items)| (*path, items));
        let all: Vec<_> = items.chain(expanded).collect();

        api.walk(sources, &all, &Vec::new(), "throughline");
        for (path, items) in &all {
            for item in *items {
                match item {
                    Item::Impl(item) if !is_hidden(&item.attrs) => {
                        api.implementation(sources, path, item)
                    }
                    Item::Macro(call)
                        if call.ident.is_none() && expand(sources, &call.mac).is_none() =>
                    {
                        let module = path.join("::");
                        let arguments = tidy(&without_docs(call.mac.tokens.clone()));
                        let call = format!("{}!({arguments})", tidy(&call.mac.path));
                        api.others.insert(format!("macro call in {module}: {call}"));
                    }
                    _ => {}
                }
            }
        }
        api
    }

    /// Lists the public items of the module `at`, which has this public name.
    fn walk(
        &mut self,
        sources: &Crate,
        all: &[(&ModulePath, &Vec<Item>)],
        at: &ModulePath,
        public: &str,
    ) {
        for item in all
            .iter()
            .filter(|(path, _)| *path == at)
            .flat_map(|(_, items)| *items)
        {
            if is_hidden(sources::attributes(item)) {
                continue;
            }
            match item {
                Item::Mod(module) if is_public(&module.vis) => {
                    let public = format!("{public}::{}", module.ident);
                    self.others
                        .insert(format!("{}mod {public}", notes(&module.attrs)));
                    let child = sources::child_of(at, &module.ident.to_string());
                    self.walk(sources, all, &child, &public);
                }
                Item::Use(item) if is_public(&item.vis) => {
                    sources::flatten(&item.tree, &mut Vec::new(), &mut |name, path| {
                        match sources.definition(at, path) {
                            Some(definition) => self.name(definition, format!("{public}::{name}")),
                            None if sources.targets(at, path).is_empty() => {
                                let line = format!("use {public}::{name} = {}", path.join("::"));
                                self.others.insert(line);
                            }
                            // Made by a macro, under the name that the module exports.
                            None => {
                                let module = sources.targets(at, path).into_iter().next_back();
                                let definition = (module.unwrap(), name.to_owned());
                                self.name(definition, format!("{public}::{name}"));
                            }
                        }
                    });
                }
                item => {
                    if let (Some(ident), true) = (sources::ident(item), is_public(visibility(item)))
                    {
                        self.name(
                            (at.clone(), ident.to_string()),
                            format!("{public}::{ident}"),
                        );
                    }
                }
            }
        }
    }

    fn name(&mut self, definition: Definition, public: String) {
        self.names.entry(definition).or_default().insert(public);
    }

    fn implementation(&mut self, sources: &Crate, module: &ModulePath, item: &syn::ItemImpl) {
        let self_type = type_path(&item.self_ty);
        let self_type = self_type.and_then(|path| sources.definition(module, &names_of(path)));
        let owner = match &item.trait_ {
            None => self_type,
            Some((path, _)) => {
                let trait_ = sources.definition(module, &names_of(path));
                match (trait_, self_type) {
                    (Some(trait_), _) if !self.names.contains_key(&trait_) => return,
                    (_, Some(self_type)) => Some(self_type),
                    (trait_, None) => trait_,
                }
            }
        };
        let Some(owner) = owner.filter(|owner| self.names.contains_key(owner)) else {
            return;
        };
        let mut head = item.clone();
        head.items.clear();
        head.attrs.clear();
        let head = tidy(&head).trim_end_matches("{ }").trim_end().to_owned();
        let head = format!("{}{head}", notes(&item.attrs));
        let mut lines = Vec::new();
        for member in item.items.iter().filter(|_| item.trait_.is_none()) {
            match member {
                ImplItem::Macro(call) => match expand(sources, &call.mac) {
                    Some(expanded) => {
                        let expanded = quote::quote!(impl X { #expanded });
                        let expanded = syn::parse2::<syn::ItemImpl>(expanded).unwrap();
                        lines.extend(expanded.items.iter().filter_map(member_line));
                    }
                    None => lines.push(format!("macro call: {}", tidy(&call.mac))),
                },
                member => lines.extend(member_line(member)),
            }
        }
        if item.trait_.is_some() || !lines.is_empty() {
            let members = self.members.entry(owner).or_default();
            members.entry(head).or_default().extend(lines);
        }
    }

    fn text(&self, sources: &Crate) -> String {
        let mut blocks = BTreeMap::new();
        for line in &self.others {
            let key = line.rsplit("throughline").next().unwrap_or_default();
            blocks.insert(key.to_owned(), line.clone());
        }
        for (definition, paths) in &self.names {
            // The longest path tells where the item is at home; the others are shorter ways to it.
            let home = paths
                .iter()
                .max_by_key(|path| path.matches("::").count())
                .unwrap();
            for other in paths.iter().filter(|path| *path != home) {
                let key = other.trim_start_matches("throughline");
                blocks.insert(key.to_owned(), format!("use {other} = {home}"));
            }
            let mut block = String::new();
            for line in self.declaration(sources, definition, home) {
                block.push_str(&line);
                block.push('\n');
            }
            for (head, lines) in self.members.get(definition).into_iter().flatten() {
                let _ = writeln!(block, "    {head}");
                for line in lines {
                    let _ = writeln!(block, "        {line}");
                }
            }
            let key = home.trim_start_matches("throughline");
            blocks.insert(format!("{key} "), block.trim_end().to_owned());
        }
        let names = self.names.values().map(BTreeSet::len).sum::<usize>();
        let mut text = format!(
            "# The public API, all features. UPDATE_PUBLIC_API=1 cargo test --test api public_api\n\
             # {} items under {names} names\n",
            self.names.len()
        );
        for block in blocks.values() {
            text.push_str(block);
            text.push('\n');
        }
        text
    }

    /// The item itself: its declaration, and below it its fields, variants or methods.
    fn declaration(&self, sources: &Crate, (module, name): &Definition, home: &str) -> Vec<String> {
        let items = &sources.modules[module].items;
        let has_name = |item: &&Item| sources::ident(item).is_some_and(|ident| ident == name);
        let expanded: Vec<_> = items
            .iter()
            .filter_map(|item| match item {
                Item::Macro(call) => expand(sources, &call.mac),
                _ => None,
            })
            .flat_map(|tokens| syn::parse2::<syn::File>(tokens).unwrap().items)
            .collect();
        let found = items.iter().chain(&expanded).find(has_name);
        let Some(item) = found else {
            let calls = items.iter().filter_map(|item| match item {
                Item::Macro(call) => Some((call, sources::macro_of(items, call)?)),
                _ => None,
            });
            let mut calls = calls.filter(|(_, item)| sources::names_made_by(item).contains(name));
            let (call, _) = calls
                .next()
                .unwrap_or_else(|| panic!("no item `{name}` in {module:?}"));
            let path = tidy(&call.mac.path);
            let arguments = tidy(&without_docs(call.mac.tokens.clone()));
            return vec![format!("{home} = {path}!({arguments})")];
        };
        let attributes = notes(sources::attributes(item));
        let mut lines = Vec::new();
        match item {
            Item::Struct(item) => {
                let generics = generics(&item.generics);
                lines.push(format!("{attributes}struct {home}{generics}"));
                fields(&item.fields, "    ", true, &mut lines);
            }
            Item::Enum(item) => {
                let generics = generics(&item.generics);
                lines.push(format!("{attributes}enum {home}{generics}"));
                for variant in &item.variants {
                    lines.push(format!("    {}{}", notes(&variant.attrs), variant.ident));
                    fields(&variant.fields, "        ", false, &mut lines);
                }
            }
            Item::Trait(item) => {
                let generics = generics(&item.generics);
                let bounds = match item.supertraits.is_empty() {
                    true => String::new(),
                    false => format!(": {}", tidy(&item.supertraits)),
                };
                lines.push(format!("{attributes}trait {home}{generics}{bounds}"));
                for member in &item.items {
                    lines.push(match member {
                        TraitItem::Fn(f) => {
                            let provided = if f.default.is_some() { " { .. }" } else { "" };
                            format!("    {}{}{provided}", notes(&f.attrs), signature(&f.sig))
                        }
                        TraitItem::Type(t) => {
                            let bounds = match t.bounds.is_empty() {
                                true => String::new(),
                                false => format!(": {}", tidy(&t.bounds)),
                            };
                            format!("    type {}{bounds}", t.ident)
                        }
                        member => format!("    {}", tidy(member)),
                    });
                }
            }
            Item::Fn(item) => {
                let signature = signature(&item.sig);
                let rest = signature.split_once(&format!("fn {name}")).unwrap();
                lines.push(format!("{attributes}{}fn {home}{}", rest.0, rest.1));
            }
            Item::Type(item) => {
                let generics = generics(&item.generics);
                lines.push(format!(
                    "{attributes}type {home}{generics} = {}",
                    tidy(&item.ty)
                ));
            }
            Item::Const(item) => {
                lines.push(format!("{attributes}const {home}: {}", tidy(&item.ty)))
            }
            item => lines.push(format!("{attributes}{home}: {}", tidy(item))),
        }
        lines
    }
}

fn generics(generics: &syn::Generics) -> String {
    tidy(generics)
        + &generics
            .where_clause
            .as_ref()
            .map(|it| format!(" {}", tidy(it)))
            .unwrap_or_default()
}

fn fields(fields: &syn::Fields, indent: &str, only_public: bool, lines: &mut Vec<String>) {
    let mut hidden = false;
    for (i, field) in fields.iter().enumerate() {
        if only_public && !is_public(&field.vis) || is_hidden(&field.attrs) {
            hidden = true;
            continue;
        }
        let name = field
            .ident
            .as_ref()
            .map_or(i.to_string(), syn::Ident::to_string);
        let attributes = notes(&field.attrs);
        lines.push(format!("{indent}{attributes}{name}: {}", tidy(&field.ty)));
    }
    if hidden {
        lines.push(format!("{indent}(private fields)"));
    }
}

/// A method or a constant, where it is public.
fn member_line(member: &ImplItem) -> Option<String> {
    match member {
        ImplItem::Fn(f) if is_public(&f.vis) && !is_hidden(&f.attrs) => {
            Some(format!("{}{}", notes(&f.attrs), signature(&f.sig)))
        }
        ImplItem::Const(c) if is_public(&c.vis) => {
            Some(format!("const {}: {}", c.ident, tidy(&c.ty)))
        }
        _ => None,
    }
}

/// A signature without the `mut` of its parameters, which does not matter to callers.
fn signature(signature: &syn::Signature) -> String {
    let mut signature = signature.clone();
    for input in &mut signature.inputs {
        match input {
            FnArg::Receiver(receiver) => receiver.mutability = None,
            FnArg::Typed(input) => {
                if let Pat::Ident(pattern) = &mut *input.pat {
                    pattern.mutability = None;
                }
            }
        }
    }
    tidy(&signature)
}

/// The attributes that matter to callers.
fn notes(attributes: &[Attribute]) -> String {
    let mut derived = Vec::new();
    let mut notes = String::new();
    for attribute in attributes {
        let path = attribute.path();
        if path.is_ident("derive") {
            let _ = attribute.parse_nested_meta(|meta| {
                derived.push(tidy(&meta.path));
                Ok(())
            });
        } else if path.is_ident("must_use") {
            notes.push_str("#[must_use] ");
        } else if path.is_ident("non_exhaustive")
            || path.is_ident("cfg")
            || path.is_ident("deprecated")
        {
            let _ = write!(notes, "{} ", tidy(attribute));
        }
    }
    if !derived.is_empty() {
        derived.sort();
        let _ = write!(notes, "#[derive({})] ", derived.join(", "));
    }
    notes
}

fn is_hidden(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        tidy(attribute) == "#[doc(hidden)]" || attribute.path().is_ident("macro_use")
    })
}

fn is_public(visibility: &Visibility) -> bool {
    matches!(visibility, Visibility::Public(_))
}

fn visibility(item: &Item) -> &Visibility {
    match item {
        Item::Const(item) => &item.vis,
        Item::Enum(item) => &item.vis,
        Item::Fn(item) => &item.vis,
        Item::Static(item) => &item.vis,
        Item::Struct(item) => &item.vis,
        Item::Trait(item) => &item.vis,
        Item::Type(item) => &item.vis,
        _ => &Visibility::Inherited,
    }
}

/// The path of a type that is a name, behind references too.
fn type_path(of: &Type) -> Option<&syn::Path> {
    match of {
        Type::Path(path) => Some(&path.path),
        Type::Reference(reference) => type_path(&reference.elem),
        Type::Group(group) => type_path(&group.elem),
        _ => None,
    }
}

fn names_of(path: &syn::Path) -> Vec<String> {
    path.segments
        .iter()
        .map(|part| part.ident.to_string())
        .collect()
}

/// Tokens as rustfmt would write them on one line.
fn tidy(tokens: &impl ToTokens) -> String {
    let mut text = tokens.to_token_stream().to_string().replace('\n', " ");
    for (spaced, tight) in [
        (" :: ", "::"),
        (":: ", "::"),
        (" ::", "::"),
        (" : ", ": "),
        (" , ", ", "),
        (" ,", ","),
        (" ; ", "; "),
        (" ;", ";"),
        ("& ", "&"),
        (" < ", "<"),
        ("< ", "<"),
        (" <", "<"),
        (" >", ">"),
        (" (", "("),
        ("( ", "("),
        (" )", ")"),
        ("# [", "#["),
        ("[ ", "["),
        (" ]", "]"),
        (" !", "!"),
        (" ?", "?"),
        ("? ", "?"),
        (",)", ")"),
        (", >", ">"),
        (",>", ">"),
        ("->(", "-> ("),
        (">where", "> where"),
        (">for", "> for"),
        ("&mut(", "&mut ("),
        ("impl::", "impl ::"),
        ("+<", "+ <"),
        ("=<", "= <"),
        (":<", ": <"),
        ("=(", "= ("),
        ("+?", "+ ?"),
        ("& ", "&"),
    ] {
        text = text.replace(spaced, tight);
    }
    text
}

/// Tokens without doc comments.
fn without_docs(tokens: TokenStream) -> TokenStream {
    let mut out = Vec::new();
    for token in tokens {
        let is_doc = matches!(&token, TokenTree::Group(group) if group.stream().to_string().starts_with("doc ="));
        if is_doc {
            // The `#` before it.
            out.pop();
        } else {
            out.push(token);
        }
    }
    out.into_iter().collect()
}

/// The tokens that a macro call of the crate stands for, if the macro has one arm and plain arguments.
fn expand(sources: &Crate, call: &syn::Macro) -> Option<TokenStream> {
    let name = &call.path.segments.last()?.ident;
    let items = sources.modules.values().flat_map(|module| &module.items);
    let definition = items
        .filter_map(|item| match item {
            Item::Macro(item) => Some(item),
            _ => None,
        })
        .find(|item| item.ident.as_ref() == Some(name))?;
    let tokens: Vec<_> = definition.mac.tokens.clone().into_iter().collect();
    let [
        TokenTree::Group(pattern),
        TokenTree::Punct(_),
        TokenTree::Punct(_),
        TokenTree::Group(body),
        end @ ..,
    ] = &tokens[..]
    else {
        return None;
    };
    if end.len() > 1 {
        return None;
    }
    let mut names = Vec::new();
    for parameter in split(pattern.stream()) {
        let [
            TokenTree::Punct(dollar),
            TokenTree::Ident(name),
            TokenTree::Punct(_),
            TokenTree::Ident(_),
        ] = &parameter[..]
        else {
            return None;
        };
        (dollar.as_char() == '$').then(|| names.push(name.to_string()))?;
    }
    let arguments = split(call.tokens.clone());
    if arguments.len() != names.len() {
        return None;
    }
    let values = names.into_iter().zip(arguments).collect();
    let expanded = substitute(body.stream(), &values);
    // Expressions are no part of the API.
    let is_items = syn::parse2::<syn::File>(expanded.clone()).is_ok_and(|file| {
        file.items
            .iter()
            .all(|item| !matches!(item, Item::Const(item) if item.ident == "_"))
    });
    let is_members = syn::parse2::<syn::ItemImpl>(quote::quote!(impl X { #expanded })).is_ok();
    (is_items || is_members).then_some(expanded)
}

fn split(tokens: TokenStream) -> Vec<Vec<TokenTree>> {
    let mut parts = vec![Vec::new()];
    for token in tokens {
        match &token {
            TokenTree::Punct(comma) if comma.as_char() == ',' => parts.push(Vec::new()),
            _ => parts.last_mut().unwrap().push(token),
        }
    }
    parts.retain(|part| !part.is_empty());
    parts
}

fn substitute(tokens: TokenStream, values: &BTreeMap<String, Vec<TokenTree>>) -> TokenStream {
    let mut out = Vec::new();
    let mut tokens = tokens.into_iter().peekable();
    while let Some(token) = tokens.next() {
        match token {
            TokenTree::Punct(dollar) if dollar.as_char() == '$' => match tokens.next() {
                Some(TokenTree::Ident(name)) => match values.get(&name.to_string()) {
                    Some(value) => out.extend(value.iter().cloned()),
                    None => out.push(TokenTree::Ident(name)),
                },
                next => out.extend(next),
            },
            TokenTree::Group(group) => {
                let inner = substitute(group.stream(), values);
                out.push(TokenTree::Group(proc_macro2::Group::new(
                    group.delimiter(),
                    inner,
                )));
            }
            token => out.push(token),
        }
    }
    out.into_iter().collect()
}

fn of(sources: &Crate) -> String {
    Api::of(sources).text(sources)
}

#[test]
fn the_public_api_is_the_one_on_record() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let record = root.join("tests/api/public_api.txt");
    let now = of(&Crate::read(&root.join("src")));
    if std::env::var_os("UPDATE_PUBLIC_API").is_some() {
        fs::write(&record, &now).unwrap();
    }
    let before = fs::read_to_string(&record).unwrap_or_default();
    let changes = diff(&before, &now);
    assert!(
        now == before,
        "the public API has changed; `UPDATE_PUBLIC_API=1 cargo test --test api public_api` records it:\n{changes}"
    );
}

/// The lines that only one of the two texts has, in their order.
fn diff(before: &str, now: &str) -> String {
    let [old, new]: [BTreeSet<_>; 2] = [before, now].map(|text| text.lines().collect());
    let gone = before
        .lines()
        .filter(|line| !new.contains(line))
        .map(|line| format!("- {line}\n"));
    let come = now
        .lines()
        .filter(|line| !old.contains(line))
        .map(|line| format!("+ {line}\n"));
    gone.chain(come).collect()
}

#[test]
fn everything_that_a_caller_can_name_is_listed_and_nothing_else() {
    let sources = Crate::from_text(&[
        ("", "pub mod a; mod b; pub use crate::a::A; pub use b::make; #[doc(hidden)] pub fn hidden() {}"),
        (
            "a",
            "pub use crate::b::{B, Number}; use std::fmt;
             #[derive(Debug, Clone)] #[non_exhaustive] pub struct A<T> { pub x: T, y: u8 }
             impl<T: Send> A<T> { #[must_use] pub fn get(mut self, mut n: u32) -> &T { &self.x } fn private(&self) {} }
             impl<T> fmt::Debug for A<T> { fn fmt(&self) {} }
             impl Private for A<u8> {} trait Private {}
             #[cfg(test)] mod tests { pub struct Test; }
             macro_rules! shared { () => { pub fn shared(&self) {} }; } impl A<u8> { shared!(); }",
        ),
        (
            "b",
            "pub enum B { One, #[non_exhaustive] Two { x: u8 } } pub struct Unreachable;
             pub trait Make: Send { type Out; fn make(&self) -> Self::Out; fn twice(&self) {} }
             pub async fn make<T>(it: T) -> T { it }
             macro_rules! id { ($name:ident, $doc:literal) => { #[derive(Copy)] pub struct $name(pub u64); } }
             id!(Number, \"x\");",
        ),
    ]);
    let text = of(&sources);
    let lines: Vec<_> = text.lines().skip(1).collect();
    assert_eq!(
        lines,
        [
            "# 4 items under 5 names",
            "use throughline::A = throughline::a::A",
            "mod throughline::a",
            "#[non_exhaustive] #[derive(Clone, Debug)] struct throughline::a::A<T>",
            "    x: T",
            "    (private fields)",
            "    impl A<u8>",
            "        fn shared(&self)",
            "    impl<T: Send> A<T>",
            "        #[must_use] fn get(self, n: u32) -> &T",
            "    impl<T> fmt::Debug for A<T>",
            "enum throughline::a::B",
            "    One",
            "    #[non_exhaustive] Two",
            "        x: u8",
            "#[derive(Copy)] struct throughline::a::Number",
            "    0: u64",
            "async fn throughline::make<T>(it: T) -> T",
        ],
        "{text}"
    );
}
