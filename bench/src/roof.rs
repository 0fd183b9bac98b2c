//! What the machine can do, and what a CUDA device can: the largest rate of a matrix product, and
//! the bandwidth of a copy.

use std::time::Instant;

use bdia_core::Layout;
use bdia_core::arena::{Category, Reals};
use bdia_core::backend::{NnOps, Order, Product, Storage};
use bdia_cpu::Cpu;
use bdia_train::cli::{BackendKind, MachineArgs, PrecisionKind};
use bdia_train::machine;

use crate::Failure;

/// The machine's limits with a number of threads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Roof {
    /// Threads.
    pub threads: usize,
    /// f32 product, operations per second (a multiply-add is two): the best of `gemm` on one square
    /// product a thread, and of the backend's own product of the same operations.
    pub flops: f64,
    /// Bytes read plus bytes written per second of a copy that no cache holds.
    pub bandwidth: f64,
}

impl Roof {
    /// Measures for about `seconds` each.
    ///
    /// # Errors
    /// Memory or threads that cannot be had.
    pub fn measure(threads: usize, seconds: f64) -> Result<Self, Failure> {
        Ok(Self { threads, flops: product(threads, seconds)?, bandwidth: copy(threads, seconds) })
    }
}

/// The product alone, see [`Roof::flops`].
///
/// # Errors
/// Memory or threads that cannot be had.
pub fn product(threads: usize, seconds: f64) -> Result<f64, Failure> {
    Ok(square(threads, seconds).max(backend(threads, seconds)?))
}

/// The best rate of `work` operations, run again and again.
fn best(seconds: f64, work: f64, mut f: impl FnMut()) -> f64 {
    f();
    let (start, mut best) = (Instant::now(), 0.0_f64);
    while best == 0.0 || start.elapsed().as_secs_f64() < seconds {
        let clock = Instant::now();
        f();
        best = best.max(work / clock.elapsed().as_secs_f64());
    }
    best
}

/// Order of the square products: operands that the second-level cache holds in panels.
const N: usize = 1024;

/// Every thread multiplies its own square matrices, so nothing is shared and nobody waits: the best
/// of the sums.
fn square(threads: usize, seconds: f64) -> f64 {
    let rates: Vec<f64> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.max(1))
            .map(|_| {
                scope.spawn(move || {
                    let (a, b, mut c) =
                        (vec![1.0_f32; N * N], vec![0.5_f32; N * N], vec![0.0_f32; N * N]);
                    best(seconds, 2.0 * (N as f64).powi(3), || {
                        // SAFETY: all three matrices are N by N, dense and column-major.
                        unsafe {
                            gemm::gemm(
                                N,
                                N,
                                N,
                                c.as_mut_ptr(),
                                N as isize,
                                1,
                                false,
                                a.as_ptr(),
                                N as isize,
                                1,
                                b.as_ptr(),
                                N as isize,
                                1,
                                0.0,
                                1.0,
                                false,
                                false,
                                false,
                                gemm::Parallelism::None,
                            );
                        }
                    })
                })
            })
            .collect();
        workers.into_iter().map(|w| w.join().unwrap_or(0.0)).collect()
    });
    rates.iter().sum()
}

/// One product of the backend over its threads.
fn backend(threads: usize, seconds: f64) -> Result<f64, Failure> {
    let mut layout = Layout::new(4);
    let [a, b, c] = [(); 3].map(|()| layout.reals(Category::Workspace, N * N));
    let mut be = Cpu::new(&layout, threads).map_err(bdia_train::Failure::from)?;
    be.fill_reals(Reals::new(0, c.start()), 0.5)?;
    let p =
        Product { rows: N, cols: N, inner: N, a: Order::Plain, b: Order::Plain, accumulate: false };
    let mut result = Ok(());
    let rate = best(seconds, 2.0 * (N as f64).powi(3), || {
        if let Err(error) = be.matmul(&p, a, b, None, c) {
            result = Err(error);
        }
    });
    result?;
    Ok(rate)
}

/// Every thread copies its part of 256 MB.
pub fn copy(threads: usize, seconds: f64) -> f64 {
    let part = (64 << 20) / threads.max(1);
    let rates: Vec<f64> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.max(1))
            .map(|_| {
                scope.spawn(move || {
                    let (from, mut to) = (vec![1.0_f32; part], vec![0.0_f32; part]);
                    best(seconds, 8.0 * part as f64, || {
                        to.copy_from_slice(&from);
                        core::hint::black_box(&mut to);
                    })
                })
            })
            .collect();
        workers.into_iter().map(|w| w.join().unwrap_or(0.0)).collect()
    });
    rates.iter().sum()
}

/// The limits of a CUDA device with a precision.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceRoof {
    /// The backend's identity: device, architecture, precision.
    pub name: String,
    /// The backend's own square product, operations per second: of the smallest size that takes 2
    /// ms, or of 4096.
    pub flops: f64,
    /// Bytes read plus bytes written per second of a copy that no cache holds.
    pub bandwidth: f64,
}

impl DeviceRoof {
    /// Measures for about `seconds` each.
    ///
    /// # Errors
    /// What the device or its libraries lack.
    pub fn measure(device: u64, precision: PrecisionKind, seconds: f64) -> Result<Self, Failure> {
        // More than the second-level cache of any card.
        const COPIED: usize = 32 << 20;
        const MOST: usize = 4096;
        let args = MachineArgs { device, precision, ..MachineArgs::on(BackendKind::Cuda) };
        let mut layout = Layout::new(4);
        let [a, b, c] =
            [(); 3].map(|()| layout.reals(Category::Workspace, COPIED.max(MOST * MOST)));
        let mut be = machine::cuda(&args, &layout)?;
        // Mixed values: a device is faster on equal ones.
        for r in [a, b] {
            let numbers = (0..r.len() as u32)
                .map(|i| (i.wrapping_mul(0x9E37_79B1) >> 8) as f32 / (1 << 24) as f32 - 0.5);
            be.write_reals(r, &numbers.collect::<Vec<_>>())?;
        }
        // Queued one after another, waited for together.
        let mut rate =
            |work: f64,
             seconds: f64,
             call: &dyn Fn(&mut bdia_cuda::Cuda) -> bdia_core::Result<()>| {
                let mut result = Ok(());
                let found = best(seconds, 8.0 * work, || {
                    for _ in 0..8 {
                        result = result.and_then(|()| call(&mut be));
                    }
                    result = result.and_then(|()| be.peek_fault().map(drop));
                });
                result.map(|()| found)
            };
        let mut n = 256;
        let flops = loop {
            let p = Product {
                rows: n,
                cols: n,
                inner: n,
                a: Order::Plain,
                b: Order::Plain,
                accumulate: false,
            };
            let work = 2.0 * (n as f64).powi(3);
            let [a, b, c] = [a, b, c].map(|r| r.sub(0, n * n));
            let product = |be: &mut bdia_cuda::Cuda| be.matmul(&p, a, b, None, c);
            let first = rate(work, 0.0, &product)?;
            if n == MOST || work / first.max(1.0) > 2e-3 {
                break rate(work, seconds, &product)?;
            }
            n *= 2;
        };
        let (from, to) = (a.sub(0, COPIED), b.sub(0, COPIED));
        let bandwidth = rate(8.0 * COPIED as f64, seconds, &|be| be.copy_reals(from, to))?;
        Ok(Self { name: be.identity().name.into(), flops, bandwidth })
    }
}
