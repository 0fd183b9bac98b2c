//! The pages say what is so: the example in them is the example, and the numbers are the crate's.

const EXAMPLE: &str = include_str!("../examples/tiny_lm.rs");
const README: &str = include_str!("../README.md");
const GUIDE: &str = include_str!("../src/guide.md");

/// The example's code behind its own description.
fn code() -> &'static str {
    EXAMPLE.split_once("\n\n").map(|(_, code)| code).unwrap_or_default()
}

#[test]
fn the_example_is_small() {
    let lines = code().lines().map(str::trim);
    let lines = lines.filter(|line| !line.is_empty() && !line.starts_with("//")).count();
    assert!((20..=30).contains(&lines), "{lines} lines of code");
}

#[test]
fn pages_show_the_example() {
    for (page, fence) in [(README, "```rust,no_run\n"), (GUIDE, "```no_run\n")] {
        assert!(page.contains(&format!("{fence}{}```\n", code())));
    }
    // The guide begins with it.
    assert!(GUIDE.find("```") < GUIDE.find("# BDIA in your framework"));
}

#[test]
fn the_readme_is_true_on_a_registry() {
    let [major, minor] = [0, 1].map(|i| env!("CARGO_PKG_RUST_VERSION").split('.').nth(i).unwrap());
    assert!(README.contains(&format!("Rust {major}.{minor} or newer")));
    assert_eq!(env!("CARGO_PKG_LICENSE"), "MIT OR Apache-2.0");
    assert!(README.contains("MIT or Apache-2.0"));
    // Links into the repository lead nowhere there.
    assert!(!README.contains("]("));
    assert!(README.lines().count() <= 100);
    for page in [README, GUIDE, EXAMPLE] {
        assert!(page.lines().all(|line| line.chars().count() <= 100));
    }
}
