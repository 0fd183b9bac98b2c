//! The C runtime starts the program and gives it `write`; Rust's std would have linked it.
fn main() {
    println!("cargo::rustc-link-lib=c");
}
