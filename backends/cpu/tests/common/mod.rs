//! The same operation on the reference backend and on the CPU with 1, 2 and 3 threads, over the
//! same memory.

#![allow(dead_code, reason = "each test program uses a part")]
#![allow(clippy::unwrap_used, reason = "only tests are built of this")]

use bdia_core::rng::{Draw, Stream};
use bdia_core::{
    Backend, Category, Chunk, Error, Fault, Ints, Layout, Reals, Reference, Result, Site, Words,
};
use bdia_cpu::{Cpu, Precision, Products};

/// The three arenas.
#[derive(Debug, Clone)]
pub struct World {
    pub ints: Vec<i32>,
    pub reals: Vec<f32>,
    pub words: Vec<u32>,
}

/// What an operation left.
#[derive(Debug, Clone)]
pub struct After {
    pub world: World,
    pub fault: Option<Fault>,
    pub result: Result<()>,
}

pub type Op<'a> = &'a dyn Fn(&mut dyn Backend<Real = f32>) -> Result<()>;

impl World {
    /// Random contents: integers of all sizes within the limits, normal reals, any words.
    pub fn new(seed: u64, ints: usize, reals: usize, words: usize) -> Self {
        let s = Stream::new(seed, 0, 0, 0, 0, Draw::Data);
        let int = |i: usize| {
            let w = s.word(i as u32);
            (w as i32 >> (w % 31)).clamp(-(1 << 30), 1 << 30)
        };
        Self {
            ints: (0..ints).map(int).collect(),
            reals: (0..reals).map(|i| s.normal(i as u32) as f32).collect(),
            words: (0..words).map(|i| s.word(0x4000_0000 + i as u32)).collect(),
        }
    }

    fn layout(&self) -> Layout {
        let mut l = Layout::new(4);
        let _ = l.ints(Category::Workspace, self.ints.len());
        let _ = l.reals(Category::Workspace, self.reals.len());
        let _ = l.words(Category::Workspace, self.words.len());
        l
    }

    pub fn reference(&self, op: Op) -> After {
        let mut world = self.clone();
        let layout = Layout::new(4);
        let mut b =
            Reference::new(&layout, &mut world.ints, &mut world.reals, &mut world.words).unwrap();
        let result = op(&mut b);
        let fault = bdia_core::Storage::take_fault(&mut b).unwrap();
        After { world, fault, result }
    }

    pub fn cpu(&self, threads: usize, op: Op) -> After {
        self.cpu_with(Products::best(Precision::F32), threads, op)
    }

    pub fn cpu_with(&self, products: Products, threads: usize, op: Op) -> After {
        use bdia_core::Storage;
        let mut cpu = Cpu::with_products(&self.layout(), threads, products).unwrap();
        let (i, r, w) = (
            Ints::new(0, self.ints.len()),
            Reals::new(0, self.reals.len()),
            Words::new(0, self.words.len()),
        );
        cpu.write_ints(i, &self.ints).unwrap();
        cpu.write_reals(r, &self.reals).unwrap();
        cpu.write_words(w, &self.words).unwrap();
        let result = op(&mut cpu);
        let fault = cpu.take_fault().unwrap();
        let mut world = self.clone();
        cpu.read_ints(i, &mut world.ints).unwrap();
        cpu.read_reals(r, &mut world.reals).unwrap();
        cpu.read_words(w, &mut world.words).unwrap();
        After { world, fault, result }
    }

    /// The operation gives the same bits for 1, 2 and 3 threads.
    pub fn threads_agree(&self, what: &str, op: Op) -> After {
        self.threads_agree_with(Products::best(Precision::F32), what, op)
    }

    pub fn threads_agree_with(&self, products: Products, what: &str, op: Op) -> After {
        let one = self.cpu_with(products, 1, op);
        for threads in [2, 3] {
            one.same_bits(
                &self.cpu_with(products, threads, op),
                &format!("{what}, {threads} threads"),
            );
        }
        one
    }

    /// The operation gives the bits of the reference backend.
    pub fn exact(&self, what: &str, op: Op) -> After {
        let one = self.threads_agree(what, op);
        one.same_bits(&self.reference(op), what);
        one
    }

    /// The operation gives the values of the reference backend, up to `tolerance` times the largest
    /// magnitude that the reference leaves among the values that changed.
    pub fn close(&self, what: &str, tolerance: f32, op: Op) -> After {
        self.close_to(&self.reference(op), Products::best(Precision::F32), what, tolerance, op)
    }

    /// As `close`, with what the reference left, and for one kind of products.
    pub fn close_to(
        &self,
        reference: &After,
        products: Products,
        what: &str,
        tolerance: f32,
        op: Op,
    ) -> After {
        let one = self.threads_agree_with(products, what, op);
        assert_eq!(one.result, reference.result, "{what}");
        assert_same_fault(&one.fault, &reference.fault, what);
        assert_eq!(one.world.ints, reference.world.ints, "{what}");
        assert_eq!(one.world.words, reference.world.words, "{what}");
        let largest = (0..self.reals.len())
            .filter(|&i| reference.world.reals[i].to_bits() != self.reals[i].to_bits())
            .map(|i| reference.world.reals[i].abs())
            .filter(|x| x.is_finite())
            .fold(0.0, f32::max);
        for (i, (a, b)) in one.world.reals.iter().zip(&reference.world.reals).enumerate() {
            let fine = a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= tolerance * largest;
            assert!(fine, "{what}: value {i} is {a:e}, reference {b:e}, largest {largest:e}");
        }
        one
    }
}

fn assert_same_fault(a: &Option<Fault>, b: &Option<Fault>, what: &str) {
    // NaN equals NaN here.
    assert_eq!(format!("{a:?}"), format!("{b:?}"), "{what}");
}

impl After {
    pub fn same_bits(&self, other: &Self, what: &str) {
        assert_eq!(self.result, other.result, "{what}");
        assert_same_fault(&self.fault, &other.fault, what);
        if let Some(i) =
            (0..self.world.ints.len()).find(|&i| self.world.ints[i] != other.world.ints[i])
        {
            panic!("{what}: integer {i} is {}, not {}", self.world.ints[i], other.world.ints[i]);
        }
        let differ = |a: f32, b: f32| a.to_bits() != b.to_bits() && !(a.is_nan() && b.is_nan());
        if let Some(i) =
            (0..self.world.reals.len()).find(|&i| differ(self.world.reals[i], other.world.reals[i]))
        {
            panic!("{what}: real {i} is {:e}, not {:e}", self.world.reals[i], other.world.reals[i]);
        }
        assert_eq!(self.world.words, other.world.words, "{what}");
    }
}

pub fn chunk(samples: usize) -> Chunk {
    Chunk {
        seed: 11,
        step: 3,
        stack: 0,
        site: Site::Block(2),
        first: 5,
        samples,
        global: 100,
        frame: 0,
    }
}

/// Whether an operation was refused for its handles.
pub fn is_handle<T>(r: &Result<T>) -> bool {
    matches!(r, Err(Error::Handle(_)))
}
