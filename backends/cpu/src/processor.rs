//! Whether this processor has the instructions that the program was compiled for.

use crate::CpuError;

/// Checks that this processor can run what the compiler was told to use. Call it first thing in
/// `main`: without it an old processor stops at an illegal instruction, without a word.
///
/// # Errors
/// [`CpuError::Processor`] names the first set of instructions that is missing.
pub fn require_cpu() -> Result<(), CpuError> {
    match missing() {
        Some(missing) => Err(CpuError::Processor { missing }),
        None => Ok(()),
    }
}

/// `is_x86_feature_detected!` is constant where a feature is compiled in, so the processor is asked
/// directly.
#[cfg(target_arch = "x86_64")]
fn missing() -> Option<&'static str> {
    use core::arch::x86_64::{__cpuid, __cpuid_count, __get_cpuid_max};

    let bit = |word: u32, n: u32| word >> n & 1 == 1;
    let leaf1 = __cpuid(1);
    let (max, _) = __get_cpuid_max(0);
    let (max_ext, _) = __get_cpuid_max(0x8000_0000);
    let leaf7 = if max >= 7 { __cpuid_count(7, 0).ebx } else { 0 };
    let ext = if max_ext >= 0x8000_0001 { __cpuid(0x8000_0001).ecx } else { 0 };
    // The operating system must save the wide registers too.
    let xcr0 = if bit(leaf1.ecx, 27) { enabled_registers() } else { 0 };
    let (ymm, zmm) = (xcr0 & 0x6 == 0x6, xcr0 & 0xE6 == 0xE6);
    let needs = [
        (cfg!(target_feature = "sse4.1"), "SSE4.1", bit(leaf1.ecx, 19)),
        (cfg!(target_feature = "popcnt"), "POPCNT", bit(leaf1.ecx, 23)),
        (cfg!(target_feature = "avx"), "AVX", bit(leaf1.ecx, 28) && ymm),
        (cfg!(target_feature = "f16c"), "F16C", bit(leaf1.ecx, 29) && ymm),
        (cfg!(target_feature = "fma"), "FMA", bit(leaf1.ecx, 12) && ymm),
        (cfg!(target_feature = "avx2"), "AVX2", bit(leaf7, 5) && ymm),
        (cfg!(target_feature = "bmi1"), "BMI1", bit(leaf7, 3)),
        (cfg!(target_feature = "bmi2"), "BMI2", bit(leaf7, 8)),
        (cfg!(target_feature = "lzcnt"), "LZCNT", bit(ext, 5)),
        (cfg!(target_feature = "movbe"), "MOVBE", bit(leaf1.ecx, 22)),
        (cfg!(target_feature = "avx512f"), "AVX-512F", bit(leaf7, 16) && zmm),
        (cfg!(target_feature = "avx512bw"), "AVX-512BW", bit(leaf7, 30) && zmm),
        (cfg!(target_feature = "avx512dq"), "AVX-512DQ", bit(leaf7, 17) && zmm),
        (cfg!(target_feature = "avx512vl"), "AVX-512VL", bit(leaf7, 31) && zmm),
    ];
    needs.into_iter().find(|&(needed, _, there)| needed && !there).map(|(_, name, _)| name)
}

/// Whether Intel made this processor.
pub(crate) fn is_intel() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        let leaf = core::arch::x86_64::__cpuid(0);
        // "GenuineIntel", four letters a register.
        [leaf.ebx, leaf.edx, leaf.ecx] == [*b"Genu", *b"ineI", *b"ntel"].map(u32::from_le_bytes)
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// The register sets that the operating system saves (XCR0).
#[cfg(target_arch = "x86_64")]
fn enabled_registers() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller has seen OSXSAVE, so the instruction exists; it reads a register and
    // touches no memory.
    unsafe {
        core::arch::asm!(
            "xgetbv",
            in("ecx") 0,
            out("eax") low,
            out("edx") high,
            options(nomem, nostack, preserves_flags)
        );
    }
    u64::from(high) << 32 | u64::from(low)
}

#[cfg(not(target_arch = "x86_64"))]
fn missing() -> Option<&'static str> {
    None
}

#[cfg(test)]
mod tests {
    #[test]
    fn this_processor_runs_this_test() {
        assert_eq!(super::require_cpu(), Ok(()));
    }
}
