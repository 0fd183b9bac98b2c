//! Memory and threads that the system refuses are errors, whatever the limit: this program runs
//! itself under limits of its address space. No test harness, whose own threads need memory.
#![allow(clippy::unwrap_used)]

use std::process::{Command, ExitCode};

use bdia_core::backend::{Order, Product};
use bdia_core::{Category, Error, ErrorKind, Layout, NnOps};
use bdia_cpu::{Cpu, CpuError, Products};

/// Says which of them this process is to do.
const CASE: &str = "BDIA_LIMITS_CASE";

/// What a process under a limit does.
fn attempt(case: &str) -> Result<(), Error> {
    let mut layout = Layout::new(4);
    match case {
        "arenas" => {
            let _ = layout.reals(Category::Workspace, 16 << 20);
            Cpu::new(&layout, 1).map(|_| ()).map_err(Error::from)
        }
        "threads" => Cpu::new(&layout, 24).map(|_| ()).map_err(|e| {
            assert!(matches!(e, CpuError::Threads { threads: 24 }), "{e}");
            e.into()
        }),
        products => {
            const N: usize = 600;
            let [a, b, c] = [0; 3].map(|_| layout.reals(Category::Workspace, N * N));
            let products =
                Products::ALL.into_iter().find(|p| format!("{p:?}") == products).unwrap();
            // `gemm` allocates in every thread, at times and in sizes that are its allocator's.
            let threads = if products == Products::Gemm { 1 } else { 3 };
            let mut cpu = Cpu::with_products(&layout, threads, products)?;
            let (plain, accumulate) = (Order::Plain, false);
            let p = Product { rows: N, cols: N, inner: N, a: plain, b: plain, accumulate };
            cpu.matmul(&p, a, b, None, c)
        }
    }
}

fn main() -> ExitCode {
    if let Ok(case) = std::env::var(CASE) {
        return match attempt(&case).map_err(|e| e.kind()) {
            Ok(()) => ExitCode::from(10),
            Err(ErrorKind::Memory) => ExitCode::from(11),
            Err(ErrorKind::Device) => ExitCode::from(12),
            Err(_) => ExitCode::from(13),
        };
    }
    if !cfg!(target_os = "linux") {
        println!("skipped: limits of the address space are those of Linux");
        return ExitCode::SUCCESS;
    }
    let products = Products::ALL.into_iter().filter(|p| p.is_available()).map(|p| format!("{p:?}"));
    for case in ["arenas", "threads"].map(String::from).into_iter().chain(products) {
        let mut seen = [0; 3];
        // From less than the program's own libraries to more than it asks for, in uneven steps.
        for kib in (8 << 10..200 << 10).step_by(3461) {
            let child = Command::new("sh")
                .args(["-c", &format!("ulimit -v {kib} && exec \"$0\"")])
                .arg(std::env::current_exe().unwrap())
                .env(CASE, &case)
                .output()
                .unwrap();
            match child.status.code() {
                Some(code @ 10..=12) => seen[code as usize - 10] += 1,
                // The loader, before any of this program ran.
                Some(127) => {}
                // The C library ends a process whose new thread has no memory for its thread-local
                // values, without asking anybody.
                None if String::from_utf8_lossy(&child.stderr).contains("Fatal glibc error") => {}
                other => panic!(
                    "{case} in {kib} KiB: {other:?} {}",
                    String::from_utf8_lossy(&child.stderr)
                ),
            }
        }
        println!(
            "{case}: {} done, {} without memory, {} without threads",
            seen[0], seen[1], seen[2]
        );
        let refused = if case == "threads" { seen[2] } else { seen[1] };
        assert!(seen[0] > 0 && refused > 0, "{case}: {seen:?}");
    }
    ExitCode::SUCCESS
}
