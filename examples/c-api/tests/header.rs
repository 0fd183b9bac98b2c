//! `include/bdia.h` is what cbindgen makes of the source. `BDIA_BLESS=1 cargo test --test header`
//! renews it.

use std::path::Path;

#[test]
fn the_header_is_current() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut made = Vec::new();
    cbindgen::generate(root).unwrap().write(&mut made);
    let made = String::from_utf8(made).unwrap();
    let path = root.join("include/bdia.h");
    if std::env::var_os("BDIA_BLESS").is_some() {
        std::fs::write(&path, &made).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap();
    assert!(
        kept == made,
        "include/bdia.h is not current; BDIA_BLESS=1 cargo test --test header renews it"
    );
    // Every exported function is declared.
    for file in ["src/lib.rs", "src/stack.rs", "src/raw.rs"] {
        let source = std::fs::read_to_string(root.join(file)).unwrap();
        for name in
            source.split("extern \"C\" fn bdia_").skip(1).filter_map(|s| s.split('(').next())
        {
            assert!(kept.contains(&format!("bdia_{name}(")), "bdia_{name} is not in the header");
        }
    }
}
