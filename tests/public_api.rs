//! The public API is what docs/public-api.txt says, so that a change of it is seen in review and meant. `make api` renews the file.
//!
//! Read from the sources, by their syntax: it needs no nightly compiler and no tool, and says the same under all of them. What
//! it cannot see are traits that are implemented by themselves (`Send`, `Sync`), and what a macro makes.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "these are tests")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use quote::ToTokens;
use syn::{Attribute, Fields, ImplItem, Item, ItemImpl, Meta, Path as Name, TraitItem, Type, UseTree, Visibility};

const LIST: &str = "docs/public-api.txt";

#[test]
fn the_public_api_is_the_one_that_is_listed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let found = api_of(&root.join("src"));
    let text = found.iter().fold(String::new(), |text, line| text + line + "\n");
    if std::env::var_os("RENEW").is_some() {
        fs::write(root.join(LIST), text).unwrap();
        return;
    }
    let listed: BTreeSet<String> =
        fs::read_to_string(root.join(LIST)).unwrap_or_default().lines().map(ToOwned::to_owned).collect();
    let gone: Vec<_> = listed.difference(&found).collect();
    let new: Vec<_> = found.difference(&listed).collect();
    assert!(
        gone.is_empty() && new.is_empty(),
        "the public API is not the one in {LIST}.\n\ngone, which breaks users:\n{gone:#?}\n\nnew:\n{new:#?}\n\n\
         If that is meant, `make api` renews the list"
    );
}

#[test]
fn what_is_public_is_found() {
    let source = "
        pub use other::{Kept, Shown};
        pub use foreign;
        #[cfg(fuzzing)] pub mod fuzzing {}
        #[derive(Clone, Debug)] #[non_exhaustive] pub struct Kept<T> { pub a: Vec<T>, b: u8 }
        pub enum Shown { A, B(u8), C { d: u8 } }
        pub trait Hidden { fn f(); }
        impl<T: Copy> Kept<T> { pub fn get(&self, x: &mut dyn Fn(u8) -> u8) -> Option<&T> where T: Send { None } fn no() {} }
        impl<T> Hidden for Kept<T> { fn f() {} }
        impl From<u8> for Shown { fn from(x: u8) -> Self { Self::A } }
        #[cfg(feature = \"f\")] impl Shown { pub async fn later(self) {} #[doc(hidden)] pub fn never() {} }
        #[cfg(test)] mod tests { impl Shown { pub fn never() {} } }";
    let file = syn::parse_file(source).unwrap();
    let items: Vec<&Item> = file.items.iter().filter(|item| shipped(attributes(item))).collect();
    let public = ["Kept", "Shown"].map(String::from).into();
    let mut lines = re_exported_crates(&items);
    for item in items {
        describe(item, &public, &BTreeSet::from(["Hidden".to_owned()]), &mut lines);
    }
    assert_eq!(
        Vec::from_iter(lines),
        [
            "enum Shown",
            "enum Shown::A",
            "enum Shown::B(u8)",
            "enum Shown::C{d: u8}",
            "fn Kept<T: Copy>: fn get(&self, x: &mut dyn Fn(u8) -> u8) -> Option<&T> where T: Send",
            "fn Shown: async fn later(self) #[cfg(feature = \"f\")]",
            "impl Clone for Kept",
            "impl Debug for Kept",
            "impl From<u8> for Shown",
            "struct Kept<T> #[non_exhaustive]",
            "struct Kept<T>::a: Vec<T>",
            "use foreign",
        ]
    );
}

/// A line for everything that users can name.
fn api_of(src: &Path) -> BTreeSet<String> {
    let root = parsed(&src.join("lib.rs"));
    let exports: Vec<(String, String)> = root.iter().flat_map(exported).collect();
    let public: BTreeSet<String> = exports.iter().map(|(_, name)| name.clone()).collect();
    assert_eq!(public.len(), exports.len(), "two items of one name");
    let modules: Vec<(String, String, Vec<Item>)> =
        files(src).into_iter().map(|path| (module_of(src, &path), gate(&path), parsed(&path))).collect();
    let all = || modules.iter().flat_map(|(_, _, items)| items);
    let private: BTreeSet<String> = all().flat_map(traits).filter(|name| !public.contains(name)).collect();

    let mut lines = re_exported_crates(&root.iter().collect::<Vec<_>>());
    for (module, name) in &exports {
        let places = modules.iter().filter(|(path, _, _)| path == module);
        let defined = places.flat_map(|(_, _, items)| items).filter(|item| named(item).as_ref() == Some(name)).count();
        assert_eq!(defined, 1, "{module}::{name} is defined {defined} times");
    }
    for (module, gate, items) in &modules {
        let mut of_file = BTreeSet::new();
        for item in items {
            let defines = named(item).is_some_and(|name| exports.contains(&(module.clone(), name)));
            if defines || matches!(item, Item::Impl(_)) {
                describe(item, &public, &private, &mut of_file);
            }
        }
        lines.extend(of_file.into_iter().map(|line| line + gate));
    }
    lines
}

/// What the whole file is conditional on, where its module is declared.
fn gate(path: &Path) -> String {
    let folder = path.parent().unwrap();
    let declared = [folder.with_extension("rs"), folder.join("lib.rs")].into_iter().find(|file| file.is_file());
    let items = declared.map(|file| parsed(&file)).unwrap_or_default();
    let stem = path.file_stem().unwrap();
    let module = items.iter().find(|item| matches!(item, Item::Mod(module) if *module.ident.to_string() == *stem));
    module.map(|item| marks(attributes(item))).unwrap_or_default()
}

/// The traits that are defined here, or in a module that stands here.
fn traits(item: &Item) -> Vec<String> {
    match item {
        Item::Trait(found) => vec![found.ident.to_string()],
        Item::Mod(module) => module.content.iter().flat_map(|(_, items)| items).flat_map(traits).collect(),
        _ => Vec::new(),
    }
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.extension().is_some_and(|end| end == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// The top module that a file belongs to.
fn module_of(src: &Path, path: &Path) -> String {
    let first = path.strip_prefix(src).unwrap().components().next().unwrap();
    Path::new(first.as_os_str()).file_stem().unwrap().to_str().unwrap().to_owned()
}

fn parsed(path: &Path) -> Vec<Item> {
    let items = syn::parse_file(&fs::read_to_string(path).unwrap()).unwrap().items;
    items.into_iter().filter(|item| shipped(attributes(item))).collect()
}

/// Module and name of everything that `pub use` takes out of a module.
fn exported(item: &Item) -> Vec<(String, String)> {
    fn leaves(tree: &UseTree, found: &mut Vec<String>) {
        match tree {
            UseTree::Path(path) => leaves(&path.tree, found),
            UseTree::Group(group) => {
                for tree in &group.items {
                    leaves(tree, found);
                }
            }
            UseTree::Name(name) => found.push(name.ident.to_string()),
            UseTree::Rename(_) | UseTree::Glob(_) => panic!("this test follows plain names only"),
        }
    }
    let Item::Use(item) = item else { return Vec::new() };
    let UseTree::Path(path) = &item.tree else { return Vec::new() };
    if !matches!(item.vis, Visibility::Public(_)) {
        return Vec::new();
    }
    let mut names = Vec::new();
    leaves(&path.tree, &mut names);
    names.into_iter().map(|name| (path.ident.to_string(), name)).collect()
}

fn re_exported_crates(items: &[&Item]) -> BTreeSet<String> {
    let crates = items.iter().filter_map(|item| match item {
        Item::Use(found) if matches!(found.vis, Visibility::Public(_)) => match &found.tree {
            UseTree::Name(name) => Some(format!("use {}", name.ident)),
            _ => None,
        },
        _ => None,
    });
    crates.collect()
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Enum(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

/// Not for tests, fuzzing or the documentation alone.
fn shipped(attributes: &[Attribute]) -> bool {
    let cfgs = attributes.iter().filter(|attribute| attribute.path().is_ident("cfg"));
    let conditions: Vec<String> = cfgs.map(|cfg| cfg.meta.to_token_stream().to_string()).collect();
    !conditions.iter().any(|condition| ["test", "fuzzing", "doc"].iter().any(|word| condition.contains(word)))
}

fn hidden(attributes: &[Attribute]) -> bool {
    let mut docs = attributes.iter().filter(|attribute| attribute.path().is_ident("doc"));
    docs.any(|doc| matches!(&doc.meta, Meta::List(list) if list.tokens.to_string().contains("hidden")))
}

fn named(item: &Item) -> Option<String> {
    let (visibility, name) = match item {
        Item::Enum(item) => (&item.vis, &item.ident),
        Item::Struct(item) => (&item.vis, &item.ident),
        Item::Trait(item) => (&item.vis, &item.ident),
        Item::Type(item) => (&item.vis, &item.ident),
        _ => return None,
    };
    matches!(visibility, Visibility::Public(_)).then(|| name.to_string())
}

fn describe(item: &Item, public: &BTreeSet<String>, private: &BTreeSet<String>, lines: &mut BTreeSet<String>) {
    match item {
        Item::Enum(item) if public.contains(&item.ident.to_string()) => {
            let name = format!("enum {}{}", item.ident, tidy(&item.generics));
            lines.insert(name.clone() + &marks(&item.attrs));
            for variant in &item.variants {
                lines.insert(format!(
                    "{name}::{}{}{}",
                    variant.ident,
                    tidy(&bare(&variant.fields)),
                    marks(&variant.attrs)
                ));
            }
            derived(&item.attrs, &item.ident.to_string(), lines);
        }
        Item::Struct(item) if public.contains(&item.ident.to_string()) => {
            let name = format!("struct {}{}", item.ident, tidy(&item.generics));
            lines.insert(name.clone() + &marks(&item.attrs));
            for field in item.fields.iter().filter(|field| matches!(field.vis, Visibility::Public(_))) {
                let label = field.ident.as_ref().map_or_else(|| "0".to_owned(), ToString::to_string);
                lines.insert(format!("{name}::{label}: {}", tidy(&field.ty)));
            }
            derived(&item.attrs, &item.ident.to_string(), lines);
        }
        Item::Trait(item) if public.contains(&item.ident.to_string()) => {
            let (bounds, clause) = (tidy(&item.supertraits), tidy(&item.generics.where_clause));
            let name = format!("trait {}{}", item.ident, tidy(&item.generics));
            lines.insert(format!("{name}: {bounds}{clause}{}", marks(&item.attrs)));
            for method in item.items.iter().filter_map(|item| match item {
                TraitItem::Fn(method) if !hidden(&method.attrs) => Some(method),
                _ => None,
            }) {
                let provided = if method.default.is_some() { " { … }" } else { "" };
                lines.insert(format!("{name}: {}{provided}{}", tidy(&method.sig), marks(&method.attrs)));
            }
        }
        Item::Type(item) => {
            lines.insert(format!("type {}{} = {}", item.ident, tidy(&item.generics), tidy(&item.ty)));
        }
        Item::Impl(item) if subject(&item.self_ty).is_some_and(|name| public.contains(&name)) => {
            implemented(item, private, lines);
        }
        _ => {}
    }
}

fn implemented(item: &ItemImpl, private: &BTreeSet<String>, lines: &mut BTreeSet<String>) {
    let (generics, subject) = (tidy(&item.generics), tidy(&item.self_ty));
    if let Some((_, of, _)) = &item.trait_ {
        if !private.contains(&last(of)) {
            let clause = tidy(&item.generics.where_clause);
            lines.insert(format!("impl{generics} {} for {subject}{clause}{}", tidy(of), marks(&item.attrs)));
        }
        return;
    }
    let name = subject.split('<').next().unwrap_or_default();
    // In `impl<M: Manager> Builder<M>` the bounds say more than the type.
    let whom =
        if generics.is_empty() || generics.starts_with("<'_") { subject.clone() } else { format!("{name}{generics}") };
    for method in item.items.iter().filter_map(|item| match item {
        ImplItem::Fn(method) if matches!(method.vis, Visibility::Public(_)) => Some(method),
        _ => None,
    }) {
        if shipped(&method.attrs) && !hidden(&method.attrs) {
            let clause = tidy(&item.generics.where_clause);
            let marks = marks(&item.attrs) + &marks(&method.attrs);
            lines.insert(format!("fn {whom}{clause}: {}{marks}", tidy(&method.sig)));
        }
    }
}

/// The fields without their attributes.
fn bare(fields: &Fields) -> Fields {
    let mut bare = fields.clone();
    bare.iter_mut().for_each(|field| field.attrs.clear());
    bare
}

fn derived(attributes: &[Attribute], name: &str, lines: &mut BTreeSet<String>) {
    for attribute in attributes.iter().filter(|attribute| attribute.path().is_ident("derive")) {
        let _ = attribute.parse_nested_meta(|meta| {
            lines.insert(format!("impl {} for {name}", last(&meta.path)));
            Ok(())
        });
    }
}

/// What else users can notice: features, and what must not be matched in full.
fn marks(attributes: &[Attribute]) -> String {
    let noticed =
        attributes.iter().filter(|found| found.path().is_ident("cfg") || found.path().is_ident("non_exhaustive"));
    noticed.fold(String::new(), |marks, attribute| marks + " #[" + &tidy(&attribute.meta) + "]")
}

fn subject(of: &Type) -> Option<String> {
    match of {
        Type::Path(path) => Some(last(&path.path)),
        Type::Reference(reference) => subject(&reference.elem),
        _ => None,
    }
}

fn last(path: &Name) -> String {
    path.segments.last().map(|segment| segment.ident.to_string()).unwrap_or_default()
}

/// Tokens as one would write them, whatever their printer thinks of blanks.
fn tidy(tokens: &impl ToTokens) -> String {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    let text = tokens.to_token_stream().to_string();
    let mut joined = String::new();
    for piece in text.split_whitespace() {
        if piece == "where" {
            joined.push_str(" where ");
            continue;
        }
        let apart = joined.ends_with(word) && piece.starts_with(|c| word(c) || c == '\'');
        joined.push_str(if apart { " " } else { "" });
        joined.push_str(piece);
    }
    let spaced =
        [("->", " -> "), ("+", " + "), (",", ", "), ("::", "\0"), (":", ": "), ("\0", "::"), ("=", " = "), (";", "; ")];
    let spaced = spaced.iter().fold(joined, |text, (from, to)| text.replace(from, to));
    let words: Vec<&str> = spaced.split(' ').filter(|word| !word.is_empty()).collect();
    let plain = words.join(" ").replace(", >", ">").replace(", )", ")").replace(", }", "}").replace("& ", "&");
    let plain = plain.trim_end_matches(',').to_owned();
    if plain.starts_with("where") { format!(" {plain}") } else { plain }
}
