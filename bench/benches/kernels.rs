//! `cargo bench -p bdia-bench`: every kernel of the CPU backend at the shapes of GPT-2 124M and the paper's ViT, in bytes
//! or operations per second, with the machine's own limit in front.
#![allow(missing_docs, reason = "criterion's macros")]

use core::time::Duration;

use bdia_bench::kernels::{Bench, GPT2, VIT, Work};
use bdia_bench::roof::Roof;
use bdia_cpu::Cpu;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

fn kernels(c: &mut Criterion) {
    let threads = std::thread::available_parallelism().map_or(1, core::num::NonZero::get);
    let roof = Roof::measure(threads, 0.5).expect("the machine's limits");
    println!(
        "roof with {threads} thread(s): {:.1} GFLOP/s in products, {:.1} GB/s read and written in a copy",
        roof.flops / 1e9,
        roof.bandwidth / 1e9
    );
    for shapes in [GPT2, VIT] {
        let mut bench = Bench::<Cpu>::new(&shapes, Bench::<Cpu>::full(), threads).expect("a layout");
        let mut be = Cpu::new(&bench.layout, threads).expect("a backend");
        bench.fill(&mut be).expect("operands");
        let mut group = c.benchmark_group(shapes.model);
        for kernel in &mut bench.kernels {
            group.throughput(match kernel.work {
                Work::Bytes(n) => Throughput::Bytes(n as u64),
                Work::Operations(n) => Throughput::Elements(n as u64),
            });
            group.bench_function(&kernel.name, |b| b.iter(|| (kernel.call)(&mut be)));
        }
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2)).sample_size(10);
    targets = kernels
}
criterion_main!(benches);
