//! depmod's two indexes, parsed: which module drives a modalias, and what a module needs.
//!
//! - `modules.dep`: `FILE: FILE FILE…`, files relative to the module directory; a module's name is its file's name without
//!   suffixes, with `_` for `-`.
//! - `modules.alias`: `alias PATTERN NAME`; patterns are shell globs (`*`, `?`, `[a-z]`) without any special treatment of `/`
//!   or leading dots.
//!
//! Lines of another form are skipped: depmod writes comments, and newer ones may write more.

use std::collections::BTreeMap;

/// A module: its file below the module directory, and the names of those that load before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Module {
    pub(crate) file: String,
    pub(crate) needs: Vec<String>,
}

/// Both indexes.
#[derive(Debug, Default)]
pub(crate) struct Index {
    modules: BTreeMap<String, Module>,
    /// Patterns by the bus in front of the colon, so that a modalias meets only those of its bus.
    aliases: BTreeMap<String, Vec<(String, String)>>,
    /// Patterns whose bus is a pattern itself (`acpi*:…`).
    open_aliases: Vec<(String, String)>,
}

impl Index {
    /// Parses the content of `modules.dep` and of `modules.alias`.
    pub(crate) fn parse(dep: &str, alias: &str) -> Self {
        let mut index = Self::default();
        for (file, needs) in dep.lines().filter_map(|line| line.split_once(':')) {
            let needs = needs.split_whitespace().map(name_of).collect();
            index.modules.insert(name_of(file), Module { file: file.to_owned(), needs });
        }
        for line in alias.lines() {
            let mut words = line.split_whitespace();
            let (Some("alias"), Some(pattern), Some(name), None) =
                (words.next(), words.next(), words.next(), words.next())
            else {
                continue;
            };
            let entry = (pattern.to_owned(), normal(name));
            match pattern.split_once(':') {
                Some((bus, _)) if !bus.contains(['*', '?', '[']) => {
                    index.aliases.entry(bus.to_owned()).or_default().push(entry);
                }
                Some(_) | None => index.open_aliases.push(entry),
            }
        }
        index
    }

    /// The module of that name.
    pub(crate) fn module(&self, name: &str) -> Option<&Module> {
        self.modules.get(name)
    }

    /// The names of the modules that a modalias asks for, in the index's order.
    pub(crate) fn matching<'a>(&'a self, modalias: &'a str) -> impl Iterator<Item = &'a str> {
        let bus = modalias.split_once(':').map_or(modalias, |(bus, _)| bus);
        let same_bus = self.aliases.get(bus).map(Vec::as_slice).unwrap_or_default();
        same_bus
            .iter()
            .chain(&self.open_aliases)
            .filter(|(pattern, _)| glob(pattern.as_bytes(), modalias.as_bytes()))
            .map(|(_, name)| name.as_str())
    }
}

/// The module name as the kernel spells it.
pub(crate) fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// The module name of a file: `kernel/drivers/net/virtio-rng.ko.xz` is `virtio_rng`.
fn name_of(file: &str) -> String {
    let base = file.rsplit('/').next().unwrap_or(file);
    normal(base.split_once(".ko").map_or(base, |(stem, _)| stem))
}

/// Whether a shell pattern matches the whole text. Time is bounded by the product of the lengths: only the last `*` is ever
/// reconsidered.
pub(crate) fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut retry: Option<(usize, usize)> = None;
    loop {
        let rest = &pattern[p..];
        if rest.first() == Some(&b'*') {
            retry = Some((p + 1, t));
            p += 1;
            continue;
        }
        if t == text.len() {
            return rest.is_empty();
        }
        if let Some(len) = match_one(rest, text[t]) {
            (p, t) = (p + len, t + 1);
            continue;
        }
        match retry {
            Some((after_star, from)) => {
                retry = Some((after_star, from + 1));
                (p, t) = (after_star, from + 1);
            }
            None => return false,
        }
    }
}

/// How many bytes of the pattern match this one byte of text; `None` when they don't.
fn match_one(pattern: &[u8], byte: u8) -> Option<usize> {
    match pattern {
        [b'?', ..] => Some(1),
        [b'[', rest @ ..] => {
            // An unclosed bracket stands for itself, as in fnmatch(3).
            let Some((set, len)) = bracket(rest) else { return (byte == b'[').then_some(1) };
            in_set(set, byte).then_some(len + 1)
        }
        [literal, ..] => (*literal == byte).then_some(1),
        [] => None,
    }
}

/// The inside of a bracket expression, and its length up to and including `]`; a `]` in first place is a member.
fn bracket(rest: &[u8]) -> Option<(&[u8], usize)> {
    let first = usize::from(matches!(rest.first(), Some(b'!' | b'^')));
    let close = rest.iter().skip(first + 1).position(|&byte| byte == b']')? + first + 1;
    Some((&rest[..close], close + 1))
}

fn in_set(set: &[u8], byte: u8) -> bool {
    let (negated, mut members) = match set {
        [b'!' | b'^', rest @ ..] => (true, rest),
        _ => (false, set),
    };
    let mut found = false;
    while let [first, rest @ ..] = members {
        if let [b'-', last, after @ ..] = rest {
            found |= (*first..=*last).contains(&byte);
            members = after;
        } else {
            found |= *first == byte;
            members = rest;
        }
    }
    found != negated
}
