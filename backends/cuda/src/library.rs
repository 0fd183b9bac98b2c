//! Which of NVIDIA's libraries are there. Asked before anything of them is called, since cudarc
//! panics where one is not.

use std::sync::OnceLock;

use crate::error::CudaError;

fn present(
    asked: &'static OnceLock<bool>,
    there: impl FnOnce() -> bool,
    what: &'static str,
    names: &[&str],
) -> Result<(), CudaError> {
    if *asked.get_or_init(there) {
        return Ok(());
    }
    let names: Vec<String> =
        names.iter().flat_map(|name| cudarc::get_lib_name_candidates(name)).collect();
    let variable = if cfg!(windows) { "PATH" } else { "LD_LIBRARY_PATH" };
    let path = match std::env::var(variable) {
        Ok(path) if !path.is_empty() => format!("{variable} ({path})"),
        _ => format!("{variable} (not set)"),
    };
    Err(CudaError::Missing { what, names: names.join(", "), path })
}

/// # Errors
/// [`CudaError::Missing`], as for the others.
pub(crate) fn driver() -> Result<(), CudaError> {
    static ASKED: OnceLock<bool> = OnceLock::new();
    // SAFETY: it only loads the library.
    let there = || unsafe { cudarc::driver::sys::is_culib_present() };
    present(
        &ASKED,
        there,
        "the CUDA driver (libcuda, part of NVIDIA's graphics driver)",
        &["cuda", "nvcuda"],
    )
}

pub(crate) fn nvrtc() -> Result<(), CudaError> {
    static ASKED: OnceLock<bool> = OnceLock::new();
    // SAFETY: it only loads the library.
    let there = || unsafe { cudarc::nvrtc::sys::is_culib_present() };
    present(
        &ASKED,
        there,
        "NVRTC (libnvrtc, part of the CUDA toolkit; PyPI has it as nvidia-cuda-nvrtc)",
        &["nvrtc"],
    )
}

pub(crate) fn cublas_lt() -> Result<(), CudaError> {
    static ASKED: OnceLock<bool> = OnceLock::new();
    // SAFETY: it only loads the library.
    let there = || unsafe { cudarc::cublaslt::sys::is_culib_present() };
    present(
        &ASKED,
        there,
        "cuBLASLt (libcublasLt, part of the CUDA toolkit; PyPI has it as nvidia-cublas)",
        &["cublasLt"],
    )
}
