//! Looks for prebuilt kernels where the feature asks for them.

fn main() {
    println!("cargo::rustc-check-cfg=cfg(bdia_prebuilt)");
    // A file that is named and not there would make every build begin anew.
    let prebuilt = std::env::var_os("CARGO_FEATURE_PREBUILT").is_some();
    println!("cargo::rerun-if-changed={}", if prebuilt { "." } else { "build.rs" });
    if prebuilt {
        if std::path::Path::new("prebuilt/kernels.ptx").exists() {
            println!("cargo::rustc-cfg=bdia_prebuilt");
        } else {
            println!(
                "cargo::warning=no prebuilt/kernels.ptx; make it with: cargo run -p bdia-cuda \
                 --example ptx -- \
                 backends/cuda/prebuilt/kernels.ptx"
            );
        }
    }
}
