//! The program on a microcontroller (`device`) and on a host (`host`).
#![cfg_attr(target_os = "none", no_std)]
#![cfg_attr(target_os = "none", no_main)]

#[cfg(target_os = "none")]
mod device;
#[cfg(not(target_os = "none"))]
mod host;
#[cfg(not(target_os = "none"))]
mod plot;

#[cfg(not(target_os = "none"))]
fn main() -> std::process::ExitCode {
    host::main()
}
