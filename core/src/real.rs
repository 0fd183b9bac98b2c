//! The floating-point types that a backend computes in: `f32` and `f64`.

use num_traits::Float;

/// `f32` or `f64`, with every operation that must give the same bits on all backends taken from
/// `libm` or from plain IEEE arithmetic, never from the platform (`num_traits::Float` changes its
/// source with the features of other crates in the graph, so it serves only where no bit depends on
/// it).
pub trait Real:
    Float
    + Default
    + core::fmt::Debug
    + core::iter::Sum
    + core::ops::AddAssign
    + core::ops::SubAssign
    + core::ops::MulAssign
    + Send
    + Sync
    + 'static
{
    /// Bytes of one value.
    const BYTES: usize;
    /// The nearest value to an integer, ties to even.
    fn from_i32(x: i32) -> Self;
    /// The value as an integer; it must lie in `i32` and be whole.
    fn to_i32_exact(self) -> i32;
    /// The nearest value of this type.
    fn of(x: f64) -> Self;
    /// The value in `f64`, exactly.
    fn wide(self) -> f64;
    /// The nearest whole number, ties to even.
    fn rint(self) -> Self;
    /// Square root, correctly rounded.
    fn root(self) -> Self;
    /// e to the power of `self`.
    fn exponential(self) -> Self;
    /// Natural logarithm.
    fn logarithm(self) -> Self;
    /// Hyperbolic tangent.
    fn hyperbolic_tangent(self) -> Self;
    /// Gauss error function.
    fn error_function(self) -> Self;
}

macro_rules! real {
    ($t:ty, $rint:path, $sqrt:path, $exp:path, $log:path, $tanh:path, $erf:path) => {
        impl Real for $t {
            const BYTES: usize = size_of::<$t>();
            #[inline]
            fn from_i32(x: i32) -> Self {
                x as $t
            }
            #[inline]
            fn to_i32_exact(self) -> i32 {
                self as i32
            }
            #[inline]
            fn of(x: f64) -> Self {
                x as $t
            }
            #[inline]
            fn wide(self) -> f64 {
                f64::from(self)
            }
            #[inline]
            fn rint(self) -> Self {
                $rint(self)
            }
            #[inline]
            fn root(self) -> Self {
                $sqrt(self)
            }
            #[inline]
            fn exponential(self) -> Self {
                $exp(self)
            }
            #[inline]
            fn logarithm(self) -> Self {
                $log(self)
            }
            #[inline]
            fn hyperbolic_tangent(self) -> Self {
                $tanh(self)
            }
            #[inline]
            fn error_function(self) -> Self {
                $erf(self)
            }
        }
    };
}

real!(f32, libm::rintf, libm::sqrtf, libm::expf, libm::logf, libm::tanhf, libm::erff);
real!(f64, libm::rint, libm::sqrt, libm::exp, libm::log, libm::tanh, libm::erf);
