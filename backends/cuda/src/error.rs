//! Why there is no backend.

use core::fmt;

use bdia_core::Error;

/// Why there is no backend.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum CudaError {
    /// A library could not be loaded.
    Missing {
        /// What it is for, and how it is usually had.
        what: &'static str,
        /// The names that were tried.
        names: String,
        /// The directories named by the environment, before those of the system.
        path: String,
    },
    /// There is no such device.
    Device {
        /// The number that was asked for.
        asked: usize,
        /// How many there are.
        found: usize,
    },
    /// The device has not enough memory left.
    Memory {
        /// Bytes that the plan needs.
        plan: usize,
        /// Bytes that are free on the device.
        free: usize,
        /// Bytes of the device.
        total: usize,
    },
    /// NVRTC refused the kernels.
    Compile {
        /// The architecture.
        arch: String,
        /// What the compiler said.
        log: String,
    },
    /// A call of the driver or of cuBLAS failed.
    Call {
        /// What was called.
        what: &'static str,
        /// The library's name of the error.
        error: &'static str,
    },
}

impl fmt::Display for CudaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { what, names, path } => write!(
                f,
                "{what} is not on this machine: looked for {names} in {path} and in the system's \
                 directories; \
                 use --backend cpu, or install it (set LD_LIBRARY_PATH where it lies elsewhere)"
            ),
            Self::Device { asked, found: 0 } => {
                write!(
                    f,
                    "device {asked} was asked for, but the driver finds no CUDA device; use \
                     --backend cpu"
                )
            }
            Self::Device { asked, found } => {
                write!(
                    f,
                    "device {asked} was asked for, the driver finds {found}: numbers 0 to {}",
                    found - 1
                )
            }
            Self::Memory { plan, free, total } => write!(
                f,
                "the plan needs {plan} bytes, the device has {free} free of {total}; choose a \
                 memory budget below that, a \
                 smaller batch or a smaller model"
            ),
            Self::Compile { arch, log } => {
                write!(f, "NVRTC could not compile the kernels for {arch}: {log}")
            }
            Self::Call { what, error } => write!(f, "{what} failed: {error}"),
        }
    }
}

impl core::error::Error for CudaError {}

impl From<CudaError> for Error {
    fn from(e: CudaError) -> Self {
        Self::Device(match e {
            CudaError::Missing { what, .. } => what,
            CudaError::Device { .. } => "there is no such device",
            CudaError::Memory { .. } => "not enough memory",
            CudaError::Compile { .. } => "the kernels could not be compiled",
            CudaError::Call { error, .. } => error,
        })
    }
}
