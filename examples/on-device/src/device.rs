//! The microcontroller. Three things belong to the board: `memory.x`, the console (here
//! semihosting, which an emulator or a debugger serves), and the counter of instructions (here the
//! system timer under the emulator's clock).

use core::fmt;
use core::sync::atomic::{AtomicU32, Ordering};

use bdia_mcu::jobs::{ARENA, Arena};
use bdia_mcu::report::{Platform, Request, Used, program};
use cortex_m::peripheral::{SYST, syst::SystClkSource};
use cortex_m_rt::{entry, exception};
use cortex_m_semihosting::{debug, hio};

/// Times that the 24-bit timer has run down.
static WRAPS: AtomicU32 = AtomicU32::new(0);
/// Instructions in a tick: the emulated board's clock is 25 MHz, and its time one nanosecond an
/// instruction.
const INSTRUCTIONS_PER_TICK: u64 = 40;
const RELOAD: u32 = 0x00FF_FFFF;

#[exception]
fn SysTick() {
    // Only this handler writes: no read-modify-write is needed, which Armv6-M does not have.
    WRAPS.store(WRAPS.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
}

/// Console and timer.
struct Board {
    console: hio::HostStream,
    timer: SYST,
}

impl fmt::Write for Board {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        self.console.write_str(s)
    }
}

/// Addresses that the linker knows.
mod symbols {
    unsafe extern "C" {
        pub static _ram_start: u32;
        pub static _flash_start: u32;
        pub static _stack_start: u32;
        pub static _stack_end: u32;
        pub static __sdata: u32;
        pub static __edata: u32;
        pub static __sidata: u32;
        pub static __sbss: u32;
        pub static __ebss: u32;
    }
}

fn address(symbol: *const u32) -> usize {
    symbol as usize
}

impl Platform for Board {
    fn instructions(&mut self) -> Option<u64> {
        loop {
            let before = WRAPS.load(Ordering::Relaxed);
            let ticks = RELOAD - SYST::get_current();
            if before == WRAPS.load(Ordering::Relaxed) {
                return Some(
                    (u64::from(before) * u64::from(RELOAD + 1) + u64::from(ticks))
                        * INSTRUCTIONS_PER_TICK,
                );
            }
        }
    }

    fn memory(&mut self) -> Option<Used> {
        let top = address(&raw const symbols::_stack_start);
        let bottom = address(&raw const symbols::_stack_end);
        let mut untouched = bottom;
        // The start-up code has painted the stack. SAFETY: the addresses lie in the stack's region,
        // which is readable memory; volatile, since the stack is in use.
        while untouched < top
            && unsafe { (untouched as *const u32).read_volatile() }
                == cortex_m_rt::STACK_PAINT_VALUE
        {
            untouched += 4;
        }
        let data = address(&raw const symbols::__edata) - address(&raw const symbols::__sdata);
        Some(Used {
            statics: data + address(&raw const symbols::__ebss)
                - address(&raw const symbols::__sbss),
            stack: top - untouched,
            stack_limit: top - bottom,
            flash: address(&raw const symbols::__sidata) + data
                - address(&raw const symbols::_flash_start),
        })
    }
}

/// The program's words, from the emulator's or debugger's command line; the first is its name.
fn command_line(buffer: &mut [u8; 128]) -> &str {
    const GET_CMDLINE: usize = 0x15;
    let mut block = [buffer.as_mut_ptr() as usize, buffer.len()];
    // SAFETY: the block holds the address and the length of a buffer that lives on; the host writes
    // at most so much.
    let failed = unsafe { cortex_m_semihosting::syscall(GET_CMDLINE, &mut block) };
    let line = if failed == 0 { buffer.get(..block[1]) } else { None };
    line.and_then(|line| core::str::from_utf8(line).ok()).unwrap_or_default()
}

#[entry]
fn main() -> ! {
    static mut ARENA_MEMORY: Arena<ARENA> = Arena::new();
    let code = match (hio::hstdout(), cortex_m::Peripherals::take()) {
        (Ok(console), Some(peripherals)) => {
            let mut board = Board { console, timer: peripherals.SYST };
            board.timer.set_clock_source(SystClkSource::Core);
            board.timer.set_reload(RELOAD);
            board.timer.clear_current();
            board.timer.enable_interrupt();
            board.timer.enable_counter();
            let mut buffer = [0; 128];
            let words = command_line(&mut buffer).split_ascii_whitespace().skip(1);
            match Request::parse(words)
                .and_then(|request| program(request, ARENA_MEMORY, &mut board, |_, _| ()))
            {
                Ok(()) => debug::EXIT_SUCCESS,
                Err(stop) => {
                    let _ = fmt::Write::write_fmt(&mut board, format_args!("{stop}\n"));
                    debug::EXIT_FAILURE
                }
            }
        }
        _ => debug::EXIT_FAILURE,
    };
    loop {
        debug::exit(code);
    }
}

#[exception]
unsafe fn HardFault(_: &cortex_m_rt::ExceptionFrame) -> ! {
    loop {
        debug::exit(debug::EXIT_FAILURE);
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    if let Ok(mut console) = hio::hstdout() {
        let _ = fmt::Write::write_fmt(&mut console, format_args!("{info}\n"));
    }
    loop {
        debug::exit(debug::EXIT_FAILURE);
    }
}
