//! `cargo bench -p bdia-bench`: every kernel of the CPU backend, and of a CUDA device where there
//! is one, at the shapes of GPT-2 124M and the paper's ViT, in bytes or operations per second, with
//! the machine's own limit in front.
#![allow(missing_docs, reason = "criterion's macros")]

use core::time::Duration;
use std::time::Instant;

use bdia_bench::kernels::{Bench, GPT2, VIT, Work};
use bdia_bench::roof::{DeviceRoof, Roof};
use bdia_core::backend::Backend;
use bdia_cpu::Cpu;
use bdia_cuda::Cuda;
use bdia_train::cli::{BackendKind, MachineArgs, PrecisionKind};
use bdia_train::machine;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

fn group<B: Backend<Real = f32>>(c: &mut Criterion, name: &str, mut bench: Bench<B>, be: &mut B) {
    bench.fill(be).expect("operands");
    let mut group = c.benchmark_group(name);
    for kernel in &mut bench.kernels {
        group.throughput(match kernel.work {
            Work::Bytes(n) => Throughput::Bytes(n as u64),
            Work::Operations(n) => Throughput::Elements(n as u64),
        });
        group.bench_function(&kernel.name, |b| {
            b.iter_custom(|calls| {
                let clock = Instant::now();
                for _ in 0..calls {
                    (kernel.call)(be).expect("a kernel");
                }
                // On a device the calls were only queued.
                be.peek_fault().expect("the device");
                clock.elapsed()
            });
        });
    }
    group.finish();
}

fn kernels(c: &mut Criterion) {
    let threads = std::thread::available_parallelism().map_or(1, core::num::NonZero::get);
    let roof = Roof::measure(threads, 0.5).expect("the machine's limits");
    println!(
        "roof with {threads} thread(s): {:.1} GFLOP/s in products, {:.1} GB/s read and written in \
         a copy",
        roof.flops / 1e9,
        roof.bandwidth / 1e9
    );
    for shapes in [GPT2, VIT] {
        let bench = Bench::<Cpu>::new(&shapes, Bench::<Cpu>::full(), threads).expect("a layout");
        let mut be = Cpu::new(&bench.layout, threads).expect("a backend");
        group(c, shapes.model, bench, &mut be);
    }
    for precision in [PrecisionKind::F32, PrecisionKind::Tf32, PrecisionKind::Bf16] {
        let roof = match DeviceRoof::measure(0, precision, 0.5) {
            Ok(roof) => roof,
            Err(error) => {
                println!("CUDA: not run: {error}");
                break;
            }
        };
        println!(
            "roof of {}: {:.1} GFLOP/s in products, {:.1} GB/s read and written in a copy",
            roof.name,
            roof.flops / 1e9,
            roof.bandwidth / 1e9
        );
        for shapes in [GPT2, VIT] {
            let bench =
                Bench::<Cuda>::new(&shapes, 16 * Bench::<Cuda>::full(), 1).expect("a layout");
            let args = MachineArgs { precision, ..MachineArgs::on(BackendKind::Cuda) };
            let mut be = machine::cuda(&args, &bench.layout).expect("a backend");
            group(c, &format!("{} {}", shapes.model, roof.name), bench, &mut be);
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .sample_size(10);
    targets = kernels
}
criterion_main!(benches);
