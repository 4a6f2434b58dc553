//! The public API is what docs/public-api.txt and testkit/public-api.txt say, so that a change of it is seen in review
//! and meant. `make api` renews the file. Each line names an item with the module that users find it in.
//!
//! Read from the sources, by their syntax: it needs no nightly compiler and no tool, and says the same under all of
//! them. What it cannot see are traits that are implemented by themselves (`Send`, `Sync`), and what a macro makes. The
//! one macro that it knows is `setters!` of `src/pool/options.rs`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "these are tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use quote::ToTokens;
use syn::parse::ParseStream;
use syn::{
    Attribute, Fields, Ident, ImplItem, Item, ItemImpl, Meta, Path as Name, Signature, Token, TraitItem, Type, UseTree,
    Visibility,
};

/// The sources of each crate that users depend on, and the list of what they find in it.
const LISTS: [(&str, &str); 2] = [("src", "docs/public-api.txt"), ("testkit/src", "testkit/public-api.txt")];

/// By the name of each public item, the path that users write.
type Public = BTreeMap<String, String>;

/// An item that users can name.
struct Export {
    /// The top module that defines it.
    module: String,
    name: String,
    /// The path that users write, from the root of the crate.
    path: String,
}

#[test]
fn the_public_api_is_the_one_that_is_listed() {
    for (sources, list) in LISTS {
        is_listed(sources, list);
    }
}

fn is_listed(sources: &str, list: &str) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let found = api_of(&root.join(sources));
    let text = found.iter().fold(String::new(), |text, line| text + line + "\n");
    if std::env::var_os("RENEW").is_some() {
        fs::write(root.join(list), text).unwrap();
        return;
    }
    let listed: BTreeSet<String> =
        fs::read_to_string(root.join(list)).unwrap_or_default().lines().map(ToOwned::to_owned).collect();
    let gone: Vec<_> = listed.difference(&found).collect();
    let new: Vec<_> = found.difference(&listed).collect();
    assert!(
        gone.is_empty() && new.is_empty(),
        "the public API is not the one in {list}.\n\ngone, which breaks users:\n{gone:#?}\n\nnew:\n{new:#?}\n\n\
         If that is meant, `make api` renews the list"
    );
}

#[test]
fn the_public_api_names_nothing_private() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let private = modules_of(&src).iter().flat_map(|module| defined(&module.items)).collect::<BTreeSet<_>>();
    let public = exports_of(&src).into_iter().map(|export| export.name).collect();
    let private: BTreeSet<String> = private.difference(&public).cloned().collect();
    let found: Vec<String> = api_of(&src).into_iter().filter(|line| names_one_of(line, &private)).collect();
    assert!(found.is_empty(), "users cannot name a type in these: {found:#?}");
}

#[test]
fn what_is_private_is_found() {
    let private = ["NoPrimary", "Source"].map(String::from).into();
    for found in ["impl From<NoPrimary> for Error", "enum Error::Aborted(Source)", "fn Error: fn abort(error: Source)"]
    {
        assert!(names_one_of(found, &private), "{found}");
    }
    for fine in
        ["enum Unsettled::NoPrimary", "fn Error: fn source(&self)", "trait C: sealed::Source + Deref<Source = C>"]
    {
        assert!(!names_one_of(fine, &private), "{fine}");
    }
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
        impl<T: Copy> Kept<T> { pub fn get(&self, x: &mut dyn Fn(u8) -> u8) -> Option<&T> where T: Send { None } fn \
                  no() {} }
        impl<T> Hidden for Kept<T> { fn f() {} }
        impl<'a, T> IntoIterator for &'a Kept<T> {}
        impl From<u8> for Shown { fn from(x: u8) -> Self { Self::A } }
        #[cfg(feature = \"f\")] impl Shown { pub async fn later(self) {} #[doc(hidden)] pub fn never() {} }
        #[cfg(test)] mod tests { impl Shown { pub fn never() {} } }";
    let file = syn::parse_file(source).unwrap();
    let items: Vec<&Item> = file.items.iter().filter(|item| shipped(attributes(item))).collect();
    let public = [("Kept", "view::Kept"), ("Shown", "Shown")].map(|(name, path)| (name.into(), path.into())).into();
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
            "fn Shown: async fn later(self) #[cfg(feature = \"f\")]",
            "fn view::Kept<T: Copy>: fn get(&self, x: &mut dyn Fn(u8) -> u8) -> Option<&T> where T: Send",
            "impl Clone for view::Kept",
            "impl Debug for view::Kept",
            "impl From<u8> for Shown",
            "impl<'a, T> IntoIterator for &'a view::Kept<T>",
            "struct view::Kept<T> #[non_exhaustive]",
            "struct view::Kept<T>::a: Vec<T>",
            "use foreign",
        ]
    );
}

#[test]
fn what_is_exported_is_found() {
    let found = |module: Option<&str>, source: &str| {
        let items = syn::parse_file(source).unwrap().items;
        let found = items.iter().flat_map(|item| exported(module, item));
        found.map(|it| format!("{} is {} of {}", it.path, it.name, it.module)).collect::<Vec<_>>()
    };
    let root = "pub use pool::{Pool, client::Client}; pub(crate) use error::Error; use fly::Fly; mod view {}
        pub use tokio_postgres; pub mod ledger { pub use crate::commit::Ledger; pub(crate) use crate::commit::WalMark; \
                }";
    let of_root = ["Pool is Pool of pool", "Client is Client of pool", "ledger::Ledger is Ledger of commit"];
    assert_eq!(found(None, root), of_root);
    let file = "pub use self::hooks::Retry; pub use budget::RetryBudget; pub use crate::commit::Unsettled; mod hooks;
        pub trait Backoff {} pub(crate) struct Retries; struct Own;";
    let of_file = [
        "retry::Retry is Retry of retry",
        "retry::RetryBudget is RetryBudget of retry",
        "retry::Unsettled is Unsettled of commit",
        "retry::Backoff is Backoff of retry",
    ];
    assert_eq!(found(Some("retry"), file), of_file);
}

/// A line for everything that users can name.
fn api_of(src: &Path) -> BTreeSet<String> {
    let exports = exports_of(src);
    let public: Public = exports.iter().map(|export| (export.name.clone(), export.path.clone())).collect();
    assert_eq!(public.len(), exports.len(), "two items of one name, or two paths to one item");
    let modules = modules_of(src);
    let all = || modules.iter().flat_map(|module| &module.items);
    let private: BTreeSet<String> = all().flat_map(traits).filter(|name| !public.contains_key(name)).collect();

    let mut lines = re_exported_crates(&parsed(&src.join("lib.rs")).iter().collect::<Vec<_>>());
    for Export { module, name, .. } in &exports {
        let places = modules.iter().filter(|place| place.top == *module).flat_map(|place| &place.items);
        let defined = places.filter(|item| named(item).as_ref() == Some(name)).count();
        assert_eq!(defined, 1, "{module}::{name} is defined {defined} times");
    }
    for Module { top, gate, items } in &modules {
        let exports = |name: &str| exports.iter().any(|export| export.module == *top && export.name == name);
        // A private type may have the name of a public one.
        let family = modules.iter().filter(|other| other.top == *top).flat_map(|other| defined(&other.items));
        let own: BTreeSet<String> = family.filter(|name| !exports(name)).collect();
        let mut public = public.clone();
        public.retain(|name, _| !own.contains(name));
        let mut of_file = BTreeSet::new();
        for item in items {
            if named(item).is_some_and(|name| exports(&name)) || matches!(item, Item::Impl(_)) {
                describe(item, &public, &private, &mut of_file);
            }
        }
        lines.extend(of_file.into_iter().map(|line| line + gate));
    }
    lines
}

/// A file of `src/`.
struct Module {
    /// The top module that it belongs to.
    top: String,
    gate: String,
    items: Vec<Item>,
}

fn modules_of(src: &Path) -> Vec<Module> {
    let module = |path: &PathBuf| Module { top: module_of(src, path), gate: gate(path), items: parsed(path) };
    files(src).iter().map(module).collect()
}

/// What the root and the public modules export.
fn exports_of(src: &Path) -> Vec<Export> {
    let root = parsed(&src.join("lib.rs"));
    let root: Vec<Item> = root.into_iter().filter(|item| !hidden(attributes(item))).collect();
    let mut found: Vec<Export> = root.iter().flat_map(|item| exported(None, item)).collect();
    for item in &root {
        if let Item::Mod(module) = item
            && module.content.is_none()
            && matches!(module.vis, Visibility::Public(_))
        {
            let name = module.ident.to_string();
            let items = parsed(&src.join(&name).with_extension("rs"));
            found.extend(items.iter().flat_map(|item| exported(Some(&name), item)));
        }
    }
    found
}

/// Whether the line has one of the names, other than as a part of a path or as an associated type.
fn names_one_of(line: &str, names: &BTreeSet<String>) -> bool {
    let mut words = line.split(|c: char| !c.is_alphanumeric() && c != '_' && c != ':');
    words.any(|word| names.contains(word.trim_end_matches(':')) && !line.contains(&format!("<{word} = ")))
}

/// The types that are defined at the top of a file.
fn defined(items: &[Item]) -> Vec<String> {
    let name = |item: &Item| match item {
        Item::Enum(item) => Some(item.ident.to_string()),
        Item::Struct(item) => Some(item.ident.to_string()),
        Item::Trait(item) => Some(item.ident.to_string()),
        Item::Type(item) => Some(item.ident.to_string()),
        _ => None,
    };
    items.iter().filter_map(name).collect()
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

/// What an item exports in the public module `within`, or in the root.
fn exported(within: Option<&str>, item: &Item) -> Vec<Export> {
    let path = |name: &str| within.map_or_else(|| name.to_owned(), |module| format!("{module}::{name}"));
    let export = |module: &str, name: String| Export { module: module.to_owned(), path: path(&name), name };
    match item {
        Item::Use(item) if matches!(item.vis, Visibility::Public(_)) => {
            let mut names = Vec::new();
            leaves(&item.tree, &mut Vec::new(), &mut names);
            let of_crate = |(origin, name): (Vec<String>, String)| match &origin[..] {
                [] => None,
                [root, module, ..] if root == "crate" => Some(export(module, name)),
                [module, ..] => Some(export(within.unwrap_or(module), name)),
            };
            names.into_iter().filter_map(of_crate).collect()
        }
        Item::Mod(module) if matches!(module.vis, Visibility::Public(_)) => {
            let (name, content) = (module.ident.to_string(), module.content.as_ref());
            assert!(within.is_none(), "{name}: this test follows one level of modules");
            content.map(|(_, items)| items).into_iter().flatten().flat_map(|item| exported(Some(&name), item)).collect()
        }
        item => {
            let defined = within.and_then(|module| Some(export(module, named(item)?)));
            defined.into_iter().collect()
        }
    }
}

/// Path and name of everything that a `use` names.
fn leaves(tree: &UseTree, path: &mut Vec<String>, found: &mut Vec<(Vec<String>, String)>) {
    match tree {
        UseTree::Path(tree) => {
            path.push(tree.ident.to_string());
            leaves(&tree.tree, path, found);
            path.pop();
        }
        UseTree::Group(group) => group.items.iter().for_each(|tree| leaves(tree, path, found)),
        UseTree::Name(name) => found.push((path.clone(), name.ident.to_string())),
        UseTree::Rename(_) | UseTree::Glob(_) => panic!("this test follows plain names only"),
    }
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
    !conditions
        .iter()
        .any(|condition| ["test", "fuzzing", "failover_sim", "doc"].iter().any(|word| condition.contains(word)))
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

fn describe(item: &Item, public: &Public, private: &BTreeSet<String>, lines: &mut BTreeSet<String>) {
    let path = |name: &Ident| public.get(&name.to_string());
    match item {
        Item::Enum(item) => {
            let Some(path) = path(&item.ident) else { return };
            let name = format!("enum {path}{}", tidy(&item.generics));
            lines.insert(name.clone() + &marks(&item.attrs));
            for variant in &item.variants {
                lines.insert(format!(
                    "{name}::{}{}{}",
                    variant.ident,
                    tidy(&bare(&variant.fields)),
                    marks(&variant.attrs)
                ));
            }
            derived(&item.attrs, path, lines);
        }
        Item::Struct(item) => {
            let Some(path) = path(&item.ident) else { return };
            let name = format!("struct {path}{}", tidy(&item.generics));
            lines.insert(name.clone() + &marks(&item.attrs));
            for field in item.fields.iter().filter(|field| matches!(field.vis, Visibility::Public(_))) {
                let label = field.ident.as_ref().map_or_else(|| "0".to_owned(), ToString::to_string);
                lines.insert(format!("{name}::{label}: {}", tidy(&field.ty)));
            }
            derived(&item.attrs, path, lines);
        }
        Item::Trait(item) => {
            let Some(path) = path(&item.ident) else { return };
            let (bounds, clause) = (tidy(&item.supertraits), tidy(&item.generics.where_clause));
            let name = format!("trait {path}{}", tidy(&item.generics));
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
            let Some(path) = path(&item.ident) else { return };
            lines.insert(format!("type {path}{} = {}", tidy(&item.generics), tidy(&item.ty)));
        }
        Item::Impl(item) => {
            if let Some(name) = subject(&item.self_ty)
                && let Some(path) = public.get(&name)
            {
                implemented(item, &tidy(&item.self_ty).replacen(&name, path, 1), private, lines);
            }
        }
        _ => {}
    }
}

/// `subject` is what it is implemented for, with its path.
fn implemented(item: &ItemImpl, subject: &str, private: &BTreeSet<String>, lines: &mut BTreeSet<String>) {
    let generics = tidy(&item.generics);
    if let Some((_, of, _)) = &item.trait_ {
        if !private.contains(&last(of)) {
            let clause = tidy(&item.generics.where_clause);
            lines.insert(format!("impl{generics} {} for {subject}{clause}{}", tidy(of), marks(&item.attrs)));
        }
        return;
    }
    let name = subject.split('<').next().unwrap_or_default();
    // In `impl<M: Manager> Builder<M>` the bounds say more than the type.
    let whom = if generics.is_empty() || generics.starts_with("<'_") {
        subject.to_owned()
    } else {
        format!("{name}{generics}")
    };
    for setter in item.items.iter().flat_map(setters) {
        lines.insert(format!(
            "fn {whom}{}: {}{}",
            tidy(&item.generics.where_clause),
            tidy(&setter),
            marks(&item.attrs)
        ));
    }
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

/// The setters that a call of the macro `setters!` makes. The rules of the macro have their arguments.
fn setters(item: &ImplItem) -> Vec<Signature> {
    let ImplItem::Macro(call) = item else { return Vec::new() };
    if !call.mac.path.is_ident("setters") {
        return Vec::new();
    }
    let rules = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/pool/options.rs")).unwrap();
    let signature = |name: Ident| {
        let (_, rule) = rules.split_once(&format!("(@{name} ")).expect("each setter has a rule");
        let (_, rest) = rule.split_once(&format!(" {name}(")).unwrap();
        let (argument, _) = rest.split_once(')').unwrap();
        syn::parse_str(&format!("fn {name}(mut self, {argument}) -> Self")).unwrap()
    };
    call.mac.parse_body_with(names_in).unwrap().into_iter().map(signature).collect()
}

fn names_in(call: ParseStream<'_>) -> syn::Result<Vec<Ident>> {
    let mut names = Vec::new();
    while !call.is_empty() {
        Attribute::parse_outer(call)?;
        names.push(call.parse()?);
        call.parse::<Token![;]>()?;
    }
    Ok(names)
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
