//! Recipes: the flags of a run in a TOML file, `--recipe FILE`.
//!
//! A recipe is a flat table: a flag's name without the dashes, and its value; `true` for flags
//! without one. `command` names the subcommand. What the command line says wins.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use bdia_models::files::read_limited;
use toml::{Table, Value};

/// The flag.
const FLAG: &str = "--recipe";
/// The key of the subcommand.
const COMMAND: &str = "command";
/// The largest recipe.
const LIMIT: u64 = 1 << 20;
/// Flags with two names.
const ALIASES: [(&str, &str); 1] = [("weights", "model")];

/// Flags of which one leaves no place for the other.
const EXCLUSIVE: [[&str; 2]; 7] = [
    ["steps", "epochs"],
    ["model", "config"],
    ["model", "layers"],
    ["model", "heads"],
    ["model", "width"],
    ["model", "vocab"],
    ["model", "tokenizer"],
];

/// The arguments with those of the recipe among them, where `--recipe` names one. The first is the
/// program's name.
///
/// # Errors
/// A sentence about a recipe that cannot be used.
pub fn expand(arguments: Vec<OsString>) -> Result<Vec<OsString>, String> {
    let Some(path) = named(&arguments)? else { return Ok(arguments) };
    let wrong = |what: String| format!("{FLAG} {}: {what}", path.display());
    let bytes = read_limited(&path, LIMIT).map_err(|e| format!("{FLAG}: {e}"))?;
    let text = String::from_utf8(bytes).map_err(|e| wrong(e.to_string()))?;
    let table: Table = text.parse().map_err(|e: toml::de::Error| wrong(e.to_string()))?;

    let (program, rest) = arguments.split_first().ok_or_else(|| wrong("no program".into()))?;
    let given: BTreeSet<String> = rest.iter().filter_map(flag).collect();
    // Only subcommands stand before all flags.
    let words = rest.iter().take_while(|a| !a.to_string_lossy().starts_with('-')).count();
    let own = words.checked_sub(1).and_then(|last| rest[last].to_str());
    let said = match table.get(COMMAND) {
        None => None,
        Some(Value::String(command)) => Some(command.as_str()),
        Some(other) => {
            return Err(wrong(format!("{COMMAND}: expected a subcommand, found {other}")));
        }
    };
    if let (Some(own), Some(said)) = (own, said)
        && own != said
    {
        return Err(wrong(format!("it is one of {said}, the command line says {own}")));
    }
    let mut all = vec![program.clone()];
    all.extend(rest[..words].iter().cloned());
    all.extend(said.filter(|_| words == 0).map(OsString::from));
    for (key, value) in table.iter().filter(|(key, _)| *key != COMMAND) {
        let name = canonical(key);
        let rivals = EXCLUSIVE.iter().filter(|pair| pair.contains(&name.as_str())).flatten();
        if given.contains(&name) || rivals.into_iter().any(|rival| given.contains(*rival)) {
            continue;
        }
        match value {
            Value::Boolean(true) => all.push(format!("--{key}").into()),
            Value::Boolean(false) => {}
            // One argument, so that a value may begin with a dash.
            Value::String(text) => all.push(format!("--{key}={text}").into()),
            Value::Integer(n) => all.push(format!("--{key}={n}").into()),
            Value::Float(x) => all.push(format!("--{key}={x}").into()),
            other => {
                let found = other.type_str();
                return Err(wrong(format!(
                    "{key}: expected a text, a number, true or false, found {found}"
                )));
            }
        }
    }
    // The recipe itself is none of the run's flags.
    let mut rest = rest.iter().skip(words);
    while let Some(argument) = rest.next() {
        match argument.to_string_lossy().strip_prefix(FLAG) {
            Some("") => drop(rest.next()),
            Some(file) if file.starts_with('=') => {}
            _ => all.push(argument.clone()),
        }
    }
    Ok(all)
}

/// The file that `--recipe` names.
fn named(arguments: &[OsString]) -> Result<Option<PathBuf>, String> {
    for (i, argument) in arguments.iter().enumerate() {
        let text = argument.to_string_lossy();
        if text == FLAG {
            let file = arguments.get(i + 1);
            let file = file.ok_or_else(|| format!("{FLAG}: expected a file, found nothing"))?;
            return Ok(Some(Path::new(file).into()));
        }
        if let Some(file) = text.strip_prefix(FLAG).and_then(|rest| rest.strip_prefix('=')) {
            return Ok(Some(file.into()));
        }
    }
    Ok(None)
}

/// The name of a flag that an argument is.
fn flag(argument: &OsString) -> Option<String> {
    let name = argument.to_str()?.strip_prefix("--")?;
    Some(canonical(name.split('=').next()?))
}

fn canonical(name: &str) -> String {
    ALIASES.iter().find(|(alias, _)| *alias == name).map_or(name, |(_, name)| name).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use bdia_models::files::testing::TempDir;

    fn read(arguments: &str) -> Result<Cli, String> {
        let arguments = core::iter::once("bdia-lm").chain(arguments.split_whitespace());
        Cli::try_parse_from(arguments.map(OsString::from)).map_err(|e| e.to_string())
    }

    #[test]
    fn the_command_line_wins() {
        let dir = TempDir::new();
        let text = "command = \"finetune\"\nmodel = \"a\"\ndata = \"b\"\nlr = 1e-5\nsteps = 7\n\
                    verify = true\npack = false\n";
        let path = dir.file("r.toml", text.as_bytes());
        let of = |flags: &str| match read(&format!("{flags} --recipe {}", path.display())) {
            Ok(Cli { command: Command::Finetune(f) }) => *f,
            other => panic!("{other:?}"),
        };
        let f = of("");
        assert_eq!((f.run.steps, f.run.optim.lr, f.run.verify, f.pack), (7, 1e-5, true, false));
        assert_eq!(f.weights, Some("a".into()));
        assert_eq!(of("--epochs 2").run.epochs, Some(2.0));
        let f = of("finetune --steps 3 --weights=c --pack");
        assert_eq!((f.run.steps, f.pack, f.weights), (3, true, Some("c".into())));
        let error = read(&format!("train --recipe {}", path.display())).unwrap_err();
        assert!(error.contains("it is one of finetune, the command line says train"), "{error}");
    }

    #[test]
    fn recipes_that_cannot_be_used() {
        let dir = TempDir::new();
        for (text, expected) in [
            ("lr", "r.toml"),
            ("lr = [1]", "lr: expected a text, a number, true or false, found array"),
            ("command = 3", "command: expected a subcommand, found 3"),
            ("learning-rate = 1", "--learning-rate"),
            ("steps = -1", "found -1"),
            ("command = \"cook\"", "cook"),
        ] {
            let path = dir.file("r.toml", text.as_bytes());
            let error = read(&format!("--recipe {}", path.display())).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
        assert!(read("--recipe nowhere.toml").unwrap_err().contains("nowhere.toml"));
        assert!(read("train --recipe").unwrap_err().contains("expected a file"));
    }

    /// Those beside the program.
    #[test]
    fn every_recipe_is_understood() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
        let mut count = 0;
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            read(&format!("--recipe {}", path.display())).unwrap();
            count += 1;
        }
        assert_eq!(count, 7);
    }
}
