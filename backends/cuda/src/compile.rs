//! From the kernels' source to an image that the driver loads: prebuilt, from the cache, or through
//! NVRTC.

use core::ffi::{c_char, c_int};
use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use cudarc::nvrtc::{result, sys};

use crate::error::CudaError;
use crate::library;

/// What every kernel may use, those of other crates too.
const COMMON: &str = include_str!("../kernels/common.cu");

/// The kernels, one after another: a single program, so that they share what `common.cu` has.
pub const SOURCE: &str = concat!(
    include_str!("../kernels/common.cu"),
    include_str!("../kernels/update.cu"),
    include_str!("../kernels/nn.cu"),
    include_str!("../kernels/attention.cu"),
    include_str!("../kernels/tensor.cu"),
    include_str!("../kernels/optim.cu"),
);

/// Products and sums as they stand: the update's bits do not depend on the compiler. Kernels that
/// may fuse say so.
const OPTIONS: [&str; 2] = ["--fmad=false", "--std=c++17"];

/// What a compilation makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Image {
    /// Text for this virtual architecture and all later ones; the driver finishes it.
    Ptx,
    /// Code for this architecture.
    Cubin,
}

/// Compiles the kernels for compute capability `major.minor`, given as `10·major + minor`. Needs
/// NVRTC, no device.
///
/// # Errors
/// [`CudaError::Missing`], [`CudaError::Compile`] with what the compiler said.
pub fn compile(capability: u32, image: Image) -> Result<Vec<u8>, CudaError> {
    compile_text(SOURCE, capability, image)
}

fn compile_text(source: &str, capability: u32, image: Image) -> Result<Vec<u8>, CudaError> {
    let arch = match image {
        Image::Ptx => format!("compute_{capability}"),
        Image::Cubin => format!("sm_{capability}"),
    };
    library::nvrtc()?;
    let failed = |log: String| CudaError::Compile { arch: arch.clone(), log };
    let source =
        CString::new(source).map_err(|_| failed("the source contains a zero byte".into()))?;
    let program = Program(
        result::create_program(&source, Some(c"bdia.cu"))
            .map_err(|e| failed(format!("{:?}", e.0)))?,
    );
    let options: Vec<&str> = OPTIONS.into_iter().collect();
    let target = format!("--gpu-architecture={arch}");
    let options: Vec<&str> = options.into_iter().chain([target.as_str()]).collect();
    // SAFETY: the program lives until the end of this function.
    if let Err(e) = unsafe { result::compile_program(program.0, &options) } {
        // SAFETY: as above.
        let log =
            unsafe { result::get_program_log(program.0) }.map(|log| text(&log)).unwrap_or_default();
        return Err(failed(format!("{:?}: {log}", e.0)));
    }
    let bytes = match image {
        // SAFETY: as above.
        Image::Ptx => unsafe { result::get_ptx(program.0) },
        Image::Cubin => program.cubin(),
    };
    Ok(bytes.map_err(|e| failed(format!("{:?}", e.0)))?.into_iter().map(|c| c as u8).collect())
}

fn text(log: &[c_char]) -> String {
    log.iter().map(|&c| c as u8 as char).take_while(|&c| c != '\0').collect()
}

struct Program(sys::nvrtcProgram);

impl Program {
    fn cubin(&self) -> Result<Vec<c_char>, result::NvrtcError> {
        let mut len = 0_usize;
        // SAFETY: the program was compiled, and the buffer is as long as NVRTC says.
        unsafe {
            sys::nvrtcGetCUBINSize(self.0, &mut len).result()?;
            let mut bytes = vec![0; len];
            sys::nvrtcGetCUBIN(self.0, bytes.as_mut_ptr()).result()?;
            Ok(bytes)
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: it was created and is destroyed once. There is nothing to do about a failure.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

/// The architectures that NVRTC compiles for, ascending.
///
/// # Errors
/// [`CudaError`]
pub fn supported() -> Result<Vec<u32>, CudaError> {
    library::nvrtc()?;
    let call = |e: result::NvrtcError| CudaError::Compile {
        arch: "any device".into(),
        log: format!("{:?}", e.0),
    };
    let mut n: c_int = 0;
    // SAFETY: NVRTC writes one number, and then as many as that.
    unsafe {
        sys::nvrtcGetNumSupportedArchs(&mut n).result().map_err(call)?;
        let mut archs = vec![0_i32; usize::try_from(n).unwrap_or(0)];
        sys::nvrtcGetSupportedArchs(archs.as_mut_ptr()).result().map_err(call)?;
        Ok(archs.into_iter().filter_map(|a| u32::try_from(a).ok()).collect())
    }
}

/// The text of another crate behind what it may use; lines are counted from its own first.
pub(crate) fn custom(source: &str, name: &str) -> String {
    format!("{COMMON}\n#line 1 \"{name}.cu\"\n{source}")
}

/// The image for a device, and the file in the cache that it came from.
pub(crate) struct Kernels {
    /// Ends with a zero byte, as text must.
    pub image: Vec<u8>,
    pub cached: Option<PathBuf>,
}

/// The image of the backend's own kernels for a device of a compute capability.
pub(crate) fn kernels(capability: u32) -> Result<Kernels, CudaError> {
    match prebuilt() {
        Some(text) => Ok(Kernels { image: terminated(text.as_bytes().to_vec()), cached: None }),
        None => image(SOURCE, capability),
    }
}

/// The image of a source for a device of a compute capability, from the cache where it is there.
///
/// A device that is newer than NVRTC gets the newest text that NVRTC makes, and the driver does the
/// rest.
pub(crate) fn image(source: &str, capability: u32) -> Result<Kernels, CudaError> {
    library::nvrtc()?;
    // Of several threads that start one compiles, and the others find what it made.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let hash = hash(source, version());
    let file = cache_dir().map(|dir| dir.join(format!("{hash:032x}-{capability}.image")));
    if let Some(file) = &file
        && let Ok(image) = std::fs::read(file)
    {
        return Ok(Kernels { image, cached: Some(file.clone()) });
    }
    fresh(source, capability, file.as_deref()).map(|image| Kernels { image, cached: None })
}

/// Compiles, and puts the image where the next process finds it. A cache that cannot be written is
/// no error.
pub(crate) fn fresh(
    source: &str,
    capability: u32,
    file: Option<&Path>,
) -> Result<Vec<u8>, CudaError> {
    let archs = supported()?;
    let image = match archs.iter().filter(|&&a| a <= capability).max() {
        Some(&arch) if arch == capability => compile_text(source, arch, Image::Cubin)?,
        Some(&arch) => compile_text(source, arch, Image::Ptx)?,
        None => {
            let oldest = archs
                .first()
                .map_or_else(String::new, |a| format!("; the oldest it knows is sm_{a}"));
            let log = format!("the device is older than this NVRTC knows{oldest}");
            return Err(CudaError::Compile { arch: format!("sm_{capability}"), log });
        }
    };
    let image = terminated(image);
    if let Some(file) = file {
        let _ = store(file, &image);
    }
    Ok(image)
}

fn terminated(mut image: Vec<u8>) -> Vec<u8> {
    if image.last() != Some(&0) {
        image.push(0);
    }
    image
}

/// All or nothing: another process may read or write the same file.
fn store(file: &Path, image: &[u8]) -> std::io::Result<()> {
    if let Some(dir) = file.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let part = file.with_extension(format!("{}.part", std::process::id()));
    std::fs::write(&part, image)?;
    std::fs::rename(&part, file)
}

#[cfg(bdia_prebuilt)]
fn prebuilt() -> Option<&'static str> {
    Some(include_str!("../prebuilt/kernels.ptx"))
}

#[cfg(not(bdia_prebuilt))]
fn prebuilt() -> Option<&'static str> {
    None
}

fn version() -> (c_int, c_int) {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: NVRTC writes two numbers.
    let _ = unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
    (major, minor)
}

/// `BDIA_CUDA_CACHE`, else `bdia/cuda` in the user's cache; none where there is no home.
fn cache_dir() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("BDIA_CUDA_CACHE").or_else(|| {
        set("XDG_CACHE_HOME")
            .or_else(|| Some(set("HOME")?.join(".cache")))
            .map(|dir| dir.join("bdia").join("cuda"))
    })
}

/// FNV-1a with 128 bits, of all that the image depends on.
fn hash(source: &str, (major, minor): (c_int, c_int)) -> u128 {
    let compiler = format!("{major}.{minor} {OPTIONS:?} ");
    compiler
        .bytes()
        .chain(source.bytes())
        .fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d, |h, b| {
            (h ^ u128::from(b)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013B)
        })
}

/// The first compute capability that has the kernels of `tensor.cu`; others do without them.
pub const TENSOR: u32 = 80;

/// A kernel of the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// Threads on a multiprocessor, of as many blocks as it asks for.
    pub threads: usize,
    /// Whether it needs [`TENSOR`].
    pub tensor: bool,
}

/// All kernels of the source.
pub fn listed() -> Vec<Listed> {
    const TENSOR_SOURCE: &str = include_str!("../kernels/tensor.cu");
    let number = |text: &str| threads(text).unwrap_or(1024) as usize;
    let listed = |d: Declaration<'_>| Listed {
        name: d.name.to_owned(),
        threads: d.bounds.split(',').map(number).product(),
        tensor: TENSOR_SOURCE.contains(&format!(") {}(", d.name)),
    };
    declarations(SOURCE).map(listed).collect()
}

/// `KERNEL(bounds) name(parameters)`, on a line of its own.
pub(crate) struct Declaration<'a> {
    /// Threads of a block, blocks on a multiprocessor.
    pub bounds: &'a str,
    pub name: &'a str,
    pub parameters: &'a str,
}

/// Those of a source, in order.
pub(crate) fn declarations(source: &str) -> impl Iterator<Item = Declaration<'_>> {
    let first = source.strip_prefix("KERNEL(").into_iter();
    first.chain(source.split("\nKERNEL(").skip(1)).map(|part| {
        let (bounds, rest) = part.split_once(')').unwrap_or_default();
        let (name, rest) = rest.split_once('(').unwrap_or_default();
        let parameters = rest.split(')').next().unwrap_or_default();
        Declaration { bounds, name: name.trim(), parameters }
    })
}

/// A number of threads or blocks, by its digits or its name in the source.
pub(crate) fn threads(text: &str) -> Option<u32> {
    match text.trim() {
        "THREADS" => Some(256),
        "TENSOR_THREADS" => Some(128),
        digits => digits.parse().ok(),
    }
}
