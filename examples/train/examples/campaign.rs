//! Stops runs of all programs at random moments, lets them go on, and compares what they leave
//! behind with runs that were left alone: weights, metrics and checkpoints, byte by byte.
//!
//! ```text
//! cargo build --release --workspace
//! cargo run --release -p bdia-train --example campaign -- --stops 1000
//! ```

#[cfg(not(unix))]
fn main() {
    eprintln!("not run: it needs the signals of Unix");
}

#[cfg(unix)]
fn main() -> std::process::ExitCode {
    campaign::main()
}

#[cfg(unix)]
mod campaign {
    use core::time::Duration;
    use std::collections::BTreeMap;
    use std::io;
    use std::os::unix::process::ExitStatusExt;
    use std::path::{Path, PathBuf};
    use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};

    use bdia_train::run::STOPPED;
    use clap::Parser;

    type Done<T = ()> = Result<T, Box<dyn core::error::Error>>;

    /// Stops runs at random moments and compares what they leave behind.
    #[derive(Debug, Parser)]
    struct Args {
        /// Stops of running programs, all together
        #[arg(long, value_name = "N", default_value_t = 1000)]
        stops: u32,
        /// Stops of one run before it is left alone
        #[arg(long, value_name = "N", default_value_t = 8)]
        each: u32,
        /// Everything random follows from it
        #[arg(long, value_name = "N", default_value_t = 1)]
        seed: u64,
        /// Where the programs are
        #[arg(long, value_name = "DIR", default_value = "target/release")]
        programs: PathBuf,
    }

    /// Program, subcommand, flags. Every run takes a second or two.
    const RUNS: [(&str, &str, &str); 9] = [
        (
            "bdia-gpt2",
            "",
            "--steps 60 --checkpoint-interval 9 --eval-interval 13 --vocab 300 --layers 3 \
          --width 16 --heads 2 --context 32 --sample 8",
        ),
        (
            "bdia-lm",
            "train",
            "--data TEXT --steps 40 --checkpoint-interval 7 --eval-interval 6 --layers 3 \
          --width 16 --heads 2 --context 32 --dropout 0.1 --sample 0",
        ),
        (
            "bdia-lm",
            "train",
            "--data TEXT --steps 30 --checkpoint-interval 1 --eval-interval 1 --layers 2 \
          --width 8 --heads 2 --context 16 --mode checkpoint --clip 1 --accumulate 2 --sample 0",
        ),
        (
            "bdia-lm",
            "finetune",
            "--task text --weights MODEL --data TEXT --method lora --steps 30 \
          --checkpoint-interval 4 --eval-interval 5 --batch 2 --context 32 --sample 0",
        ),
        (
            "bdia-lm",
            "finetune",
            "--task text --weights MODEL --data TEXT --epochs 0.2 --checkpoint-interval 4 \
          --eval-interval 5 --batch 2 --context 32 --sample 0 --optimizer set-adam",
        ),
        (
            "bdia-vit",
            "train",
            "--train-subset 300 --test-subset 100 --epochs 6 --checkpoint-interval 1 \
          --width 16 --layers 3 --heads 2 --mixup 0.2",
        ),
        (
            "bdia-vit",
            "train",
            "--train-subset 300 --test-subset 100 --steps 40 --checkpoint-interval 0 \
          --checkpoint-minutes 0.002 --width 16 --layers 3 --heads 2 --network revvit",
        ),
        (
            "bdia-translate",
            "train",
            "--pairs 400 --held 40 --epochs 4 --checkpoint-interval 1 --layers 2 \
          --width 16 --heads 2 --translate 10",
        ),
        (
            "bdia-translate",
            "train",
            "--pairs 400 --held 40 --steps 30 --checkpoint-interval 0 \
          --checkpoint-minutes 0.002 --layers 2 --width 16 --heads 2 --mode standard --dropout 0.2",
        ),
    ];

    const SIGNALS: [i32; 4] = [libc::SIGKILL, libc::SIGINT, libc::SIGTERM, libc::SIGUSR1];

    struct Campaign {
        args: Args,
        dir: PathBuf,
        random: u64,
        /// Stops by signal.
        stops: BTreeMap<i32, u32>,
    }

    pub fn main() -> ExitCode {
        let dir = std::env::temp_dir().join(format!("bdia-campaign-{}", std::process::id()));
        let args = Args::parse();
        let random = args.seed;
        let mut campaign = Campaign { args, dir, random, stops: BTreeMap::new() };
        let done = campaign.run();
        match done {
            Ok(()) => {
                let _ = std::fs::remove_dir_all(&campaign.dir);
                ExitCode::SUCCESS
            }
            Err(error) => {
                eprintln!("error: {error} (what is left is in {})", campaign.dir.display());
                ExitCode::FAILURE
            }
        }
    }

    impl Campaign {
        fn below(&mut self, n: u64) -> u64 {
            let factor = 6_364_136_223_846_793_005;
            self.random = self.random.wrapping_mul(factor).wrapping_add(1_442_695_040_888_963_407);
            (self.random >> 33) % n.max(1)
        }

        fn run(&mut self) -> Done {
            std::fs::create_dir_all(&self.dir)?;
            let text = "Permission is hereby granted, free of charge, to any person. ".repeat(300);
            std::fs::write(self.dir.join("TEXT"), text)?;
            let model = "train --data TEXT --steps 2 --layers 2 --heads 2 --width 16 --context 32 \
                         --sample 0 --out MODEL";
            let mut first = self.program("bdia-lm");
            ended(&mut spawn(first.args(model.split_whitespace()))?, &first)?;

            let mut whole = Vec::new();
            for (i, &(name, _, _)) in RUNS.iter().enumerate() {
                let (command, out) = (self.begin(i, &format!("whole-{i}")), format!("whole-{i}"));
                let mut command = command;
                let mut child = spawn(&mut command)?;
                let mut time = 0;
                while child.try_wait()?.is_none() {
                    time = processor_time(&child).unwrap_or(time);
                    std::thread::sleep(Duration::from_millis(1));
                }
                ended(&mut child, &command)?;
                println!("{name} {i}: {} ms of processor time when left alone", time / 1_000_000);
                whole.push((left_behind(&self.dir.join(out))?, time));
            }
            let bar = bdia_train::run::bar("stop", self.args.stops.into(), 0);
            for round in 0.. {
                let i = round as usize % RUNS.len();
                let out = format!("run-{round}");
                self.one(i, &out, whole[i].1, &bar)?;
                compare(RUNS[i].0, &whole[i].0, &left_behind(&self.dir.join(&out))?)?;
                std::fs::remove_dir_all(self.dir.join(&out))?;
                if self.stops.values().sum::<u32>() >= self.args.stops {
                    bar.finish_and_clear();
                    let told = |(signal, n): (&i32, &u32)| format!("{n} by signal {signal}");
                    let told: Vec<_> = self.stops.iter().map(told).collect();
                    println!("{} runs, stopped {}: 0 bytes differ", round + 1, told.join(", "));
                    return Ok(());
                }
            }
            Ok(())
        }

        fn program(&self, name: &str) -> Command {
            let program = std::path::absolute(self.args.programs.join(name));
            let mut command = Command::new(program.unwrap_or_else(|_| name.into()));
            command.current_dir(&self.dir);
            command
        }

        fn begin(&self, i: usize, out: &str) -> Command {
            let (name, subcommand, flags) = RUNS[i];
            let mut command = self.program(name);
            command.args(subcommand.split_whitespace()).args(flags.split_whitespace());
            command.args(["--out", out]);
            command
        }

        /// A run that is stopped again and again, and then ends.
        fn one(&mut self, i: usize, out: &str, time: u64, bar: &indicatif::ProgressBar) -> Done {
            let (name, subcommand, _) = RUNS[i];
            let mut left = self.args.each;
            loop {
                let mut command = if self.dir.join(out).join("run.json").exists() {
                    let mut command = self.program(name);
                    command.args(subcommand.split_whitespace()).args(["--resume", out]);
                    command
                } else {
                    self.begin(i, out)
                };
                let mut child = spawn(&mut command)?;
                let signal = SIGNALS[self.below(SIGNALS.len() as u64) as usize];
                let moment = self.below(time);
                if left > 0 {
                    while child.try_wait()?.is_none()
                        && processor_time(&child).is_some_and(|t| t < moment)
                    {
                        std::thread::sleep(Duration::from_micros(200));
                    }
                    if child.try_wait()?.is_none() {
                        // SAFETY: a plain call; nobody has waited for the child, so the number is
                        // its own.
                        unsafe { libc::kill(child.id() as i32, signal) };
                    }
                }
                let status = child.wait()?;
                let stopped = status.code() == Some(STOPPED.into()) || status.signal().is_some();
                if left > 0 && (stopped || signal == libc::SIGUSR1) {
                    left -= 1;
                    *self.stops.entry(signal).or_default() += 1;
                    bar.set_position(self.stops.values().sum::<u32>().into());
                }
                if !stopped {
                    return ended(&mut child, &command);
                }
            }
        }
    }

    fn spawn(command: &mut Command) -> io::Result<Child> {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()
    }

    /// Refuses a program that failed.
    fn ended(child: &mut Child, command: &Command) -> Done {
        let status: ExitStatus = child.wait()?;
        if status.success() {
            return Ok(());
        }
        let mut told = String::new();
        if let Some(stderr) = &mut child.stderr {
            io::Read::read_to_string(stderr, &mut told)?;
        }
        Err(format!("{command:?} ended with {status}: {told}").into())
    }

    /// Nanoseconds that the threads of a process have computed.
    fn processor_time(child: &Child) -> Option<u64> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", child.id())).ok()?;
        let time = |task: std::fs::DirEntry| {
            let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
            text.split(' ').next()?.parse::<u64>().ok()
        };
        Some(tasks.flatten().filter_map(time).sum())
    }

    /// What must not depend on stops: all files, without what tells the time or which of the
    /// checkpoints are there.
    fn left_behind(dir: &Path) -> Done<BTreeMap<String, Vec<u8>>> {
        let mut files = BTreeMap::new();
        for entry in std::fs::read_dir(dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let mut bytes = std::fs::read(entry.path())?;
            if name == "metrics.jsonl" {
                let text = String::from_utf8(bytes)?;
                let mut timeless = String::new();
                for line in text.lines() {
                    let mut metric: serde_json::Value = serde_json::from_str(line)?;
                    metric["items_per_s"] = 0.into();
                    timeless += &format!("{metric}\n");
                }
                bytes = timeless.into_bytes();
            }
            // Its flags name the directory.
            if name != "run.json" {
                files.insert(name, bytes);
            }
        }
        let last = files.keys().rfind(|n| n.ends_with(".ckpt")).cloned();
        files.retain(|name, _| !name.ends_with(".ckpt") || Some(name) == last.as_ref());
        Ok(files)
    }

    fn compare(
        name: &str,
        whole: &BTreeMap<String, Vec<u8>>,
        found: &BTreeMap<String, Vec<u8>>,
    ) -> Done {
        let [a, b] = [whole, found].map(|files| files.keys().collect::<Vec<_>>());
        if a != b {
            return Err(format!("{name}: files {b:?}, expected {a:?}").into());
        }
        for (file, bytes) in whole {
            let differ = bytes.iter().zip(&found[file]).filter(|(a, b)| a != b).count()
                + bytes.len().abs_diff(found[file].len());
            if differ > 0 {
                return Err(format!("{name}: {differ} bytes of {file} differ").into());
            }
        }
        Ok(())
    }
}
