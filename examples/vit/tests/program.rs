//! Runs of the program itself: training, exact resuming, evaluation, every experiment in small.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Output, Stdio};

use bdia_models::files::testing::TempDir;
use bdia_train::testing::{self, close, json, metrics, repeat_the_end, same_files};

const PROGRAM: &str = env!("CARGO_BIN_EXE_bdia-vit");

const SMALL: &str = "--train-subset 80 --test-subset 40 --layers 3 --width 16 --heads 2 --mlp 16 \
                     --batch 16 --threads 2";

fn run(out: &Path, arguments: &str) -> Output {
    testing::run(PROGRAM, out, arguments)
}

fn good(out: &Path, arguments: &str) -> String {
    testing::good(PROGRAM, out, arguments)
}

/// The directory of a run is to be added.
fn resume() -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(["train", "--resume"]);
    command
}

#[test]
fn training_is_exact_and_resumes_exactly() {
    let dir = TempDir::new();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let flags = format!(
        "train {SMALL} --epochs 4 --checkpoint-interval 1 --mixup 0.2 --smoothing 0.1 \
         --drop-path 0.1"
    );
    let whole = json(&good(&a, &format!("{flags} --verify --json")));
    assert_eq!(whole["verify_mismatches"], 0);
    assert!(
        whole["accuracy"].as_f64().is_some()
            && whole["peak_bytes"].as_u64() <= whole["plan_bytes"].as_u64().map(|p| p + (1 << 20))
    );
    for file in [
        "config.json",
        "model.safetensors",
        "best.safetensors",
        "run.json",
        "loss.svg",
        "accuracy.svg",
    ] {
        assert!(a.join(file).is_file(), "{file}");
    }
    // The last epoch again, from the checkpoint before it.
    good(&b, &flags);
    let told = repeat_the_end(&mut resume(), &b, 20);
    assert!(told.contains("goes on after step 15"), "{told}");
    same_files(&a, &b, &["model.safetensors", "best.safetensors"]);
    assert_eq!(metrics(&a, "items_per_s"), metrics(&b, "items_per_s"));

    // Other settings are refused, by name.
    let o = Command::new(env!("CARGO_BIN_EXE_bdia-vit"))
        .args(["--resume"])
        .arg(&b)
        .args(["--lr", "0.5"])
        .output()
        .unwrap();
    assert_eq!(o.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&o.stderr).contains("--lr is 0.5, the run has 0.002"));

    // What was saved is what is evaluated, in float and on the grid.
    for inference in ["float", "quantized"] {
        let o = Command::new(env!("CARGO_BIN_EXE_bdia-vit"))
            .args(["eval", "--json", "--inference", inference, "--weights"])
            .arg(&a)
            .output()
            .unwrap();
        assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
        let found = json(&String::from_utf8(o.stdout).unwrap());
        let (x, y) = (found["accuracy"].as_f64().unwrap(), whole["accuracy"].as_f64().unwrap());
        // One of the 40 images may fall to the other side on the grid.
        assert!((x - y).abs() <= if inference == "float" { 0.0 } else { 0.026 }, "{x} {y}");
    }
}

/// Adapters and head of a trained network: what is frozen stays, the result is an ordinary network,
/// and a run goes on exactly, on the weights that it began with.
#[test]
fn adapters_are_trained_on_frozen_weights() {
    let dir = TempDir::new();
    let [base, a, b] = ["base", "a", "b"].map(|name| dir.path().join(name));
    good(&base, &format!("train {SMALL} --epochs 2"));
    let flags = format!(
        "train {SMALL} --epochs 3 --checkpoint-interval 1 --method lora --lora-rank 2 --replace \
         --weights {}",
        base.display()
    );
    let o = run(&a, &format!("train {SMALL} --method lora"));
    assert_eq!(o.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&o.stderr).contains("--method lora needs --weights"));

    for frozen in ["f32", "bf16"] {
        let flags = format!("{flags} --frozen-dtype {frozen}");
        let whole = json(&good(&a, &format!("{flags} --verify --json")));
        assert_eq!(whole["verify_mismatches"], 0);
        let trained = whole["trained_parameters"].as_u64().unwrap();
        // Three blocks, two adapters of rank 2 each, A and B; norm and head.
        assert_eq!(trained, 3 * 2 * 2 * 2 * 16 + 2 * 16 + 16 * 10 + 10);

        let read = |dir: &Path| {
            let path = vec![dir.join("model.safetensors")];
            bdia_models::weights::Weights::read_files(path).unwrap()
        };
        let (before, after) = (read(&base), read(&a));
        for (name, tensor) in before.tensors() {
            let mut values = [vec![0.0; tensor.len()], vec![0.0; tensor.len()]];
            before.read(name, &mut values[0]).unwrap();
            after.read(name, &mut values[1]).unwrap();
            if frozen == "bf16" && name.starts_with("blocks") && tensor.shape.len() == 2 {
                for x in &mut values[0] {
                    // To nearest, ties to even.
                    let bits = x.to_bits();
                    *x = f32::from_bits((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF_0000);
                }
            }
            let ends = ["norm.weight", "norm.bias", "head.weight", "head.bias"];
            let changes = name.ends_with("qkv.weight") || ends.contains(&name);
            assert_eq!(values[0] != values[1], changes, "{frozen}: {name}");
            if name.contains("qkv.weight") {
                // Keys have no adapter.
                assert_eq!(values[0][16 * 16..32 * 16], values[1][16 * 16..32 * 16], "{name}");
            }
        }
        // What was written is what was measured, up to the roundings of the sum.
        let o = Command::new(PROGRAM).args(["eval", "--json", "--weights"]).arg(&a).output();
        let found = json(&String::from_utf8(o.unwrap().stdout).unwrap());
        let (x, y) = (found["loss"].as_f64().unwrap(), whole["val_loss"].as_f64().unwrap());
        assert!((x - y).abs() < 1e-5 * y, "{x} {y}");

        // The last epoch again.
        good(&b, &flags);
        repeat_the_end(&mut resume(), &b, 15);
        same_files(&a, &b, &["model.safetensors", "best.safetensors"]);
        if frozen == "bf16" {
            good(&base, &format!("train {SMALL} --epochs 1 --replace"));
            let o = resume().arg(&b).output().unwrap();
            let told = String::from_utf8_lossy(&o.stderr).into_owned();
            assert!(o.status.code() == Some(1) && told.contains("whose adapters"), "{told}");
            // A run does not overwrite what it starts from.
            let o = run(&base, &flags);
            let told = String::from_utf8_lossy(&o.stderr).into_owned();
            assert!(o.status.code() == Some(1) && told.contains("would be overwritten"), "{told}");
        }
    }
}

/// Killed at many moments, while checkpoints are written too, a run ends with the bits of one that
/// was left alone.
#[test]
fn killed_runs_end_the_same() {
    let dir = TempDir::new();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let flags = format!("train {SMALL} --epochs 30 --checkpoint-interval 1 --mixup 0.2");
    good(&a, &flags);
    let lines = |dir: &Path| {
        std::fs::read(dir.join("metrics.jsonl")).map_or(0, |t| t.split(|&c| c == b'\n').count() - 1)
    };
    let names = |dir: &Path| -> Vec<String> {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries.filter_map(|e| e.file_name().into_string().ok()).collect();
        names.sort();
        names
    };
    let mut kills = 0_usize;
    for i in 0..100_u32 {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bdia-vit"));
        if b.join("run.json").exists() {
            command.args(["train", "--resume"]).arg(&b);
        } else {
            command.args(flags.split_whitespace()).arg("--out").arg(&b);
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        if kills < 8 {
            // After some more steps, or with a checkpoint half written.
            let (after, half) = (lines(&b) + 3 + (i as usize * 7) % 11, i % 2 == 0);
            let done =
                || lines(&b) >= after && (!half || names(&b).iter().any(|n| n.ends_with(".tmp")));
            while child.try_wait().unwrap().is_none() && !done() {
                std::thread::sleep(core::time::Duration::from_micros(200));
            }
            child.kill().unwrap();
        }
        let status = child.wait().unwrap();
        if status.success() {
            break;
        }
        assert_eq!(status.code(), None, "it ended by itself");
        kills += 1;
    }
    assert!(kills >= 4, "killed only {kills} times");
    assert_eq!(names(&a), names(&b));
    let names = names(&a);
    let files = names.iter().filter(|n| n.ends_with("safetensors") || n.ends_with("ckpt"));
    same_files(&a, &b, &files.map(String::as_str).collect::<Vec<_>>());
    assert_eq!(metrics(&a, "items_per_s"), metrics(&b, "items_per_s"));
}

/// Every baseline trains, from the same data in the same order; more threads give the same bits.
#[test]
fn baselines() {
    let dir = TempDir::new();
    let mut accuracies = Vec::new();
    for (i, flags) in [
        "--mode standard",
        "--mode standard --quantize",
        "--mode checkpoint",
        "--mode bdia-float --gamma 0.6 --verify",
        "--gamma 0.25 --verify",
        "--gamma 0.25,3:0.125 --gamma-sign shared --blocks-per-step 2 --verify",
        "--network revvit --verify",
        "--mode standard --drop-path 0.3",
        "--plain",
        "--clip 1 --optimizer adamw",
        "--accumulate 2 --mixup 0.2 --verify",
        "--steps 7",
    ]
    .iter()
    .enumerate()
    {
        let out = dir.path().join(i.to_string());
        let epochs = if flags.starts_with("--steps") { "" } else { "--epochs 2" };
        let v = json(&good(&out, &format!("train {SMALL} {epochs} {flags} --json")));
        assert!(v["val_loss"].as_f64().unwrap().is_finite(), "{flags}");
        if let Some(e) = v["rebuild_error"].as_f64() {
            assert!(e > 0.0 && e < 1e-2, "{flags}: {e}");
        }
        accuracies.push(v["val_loss"].as_f64().unwrap().to_bits());
    }
    // Storing and recomputing give the same bits.
    assert_eq!(accuracies[0], accuracies[2]);
    let one = json(&good(
        &dir.path().join("one"),
        &format!(
            "train {} --epochs 2 --mode standard --json",
            SMALL.replace("--threads 2", "--threads 1")
        ),
    ));
    assert_eq!(one["val_loss"].as_f64().unwrap().to_bits(), accuracies[0]);
}

/// Micro-batches see what one large batch sees: the same images, changed, mixed and dropped out of
/// in the same way.
#[test]
fn micro_batches_are_one_batch() {
    let dir = TempDir::new();
    let of = |name: &str, batch: &str| {
        // Small steps, which amplify the rounding of gradients little.
        let flags = "--epochs 2 --augment crop-flip --dropout 0.1 --drop-path 0.1 --mixup 0.2";
        let small = SMALL.replace("--batch 16", batch);
        good(&dir.path().join(name), &format!("train {small} {flags} --lr 2e-4"));
        metrics(&dir.path().join(name), "items_per_s")
    };
    close(&of("one", "--batch 16"), &of("four", "--batch 4 --accumulate 4"), 1e-4);
}

/// Class folders in `dir`: pictures of a shade that tells the class.
fn folders(dir: &Path, classes: &[(&str, u8)]) {
    for (class, shade) in classes {
        let folder = dir.join(class);
        std::fs::create_dir_all(&folder).unwrap();
        for i in 0..10 {
            let picture = image::RgbImage::from_pixel(8, 8, image::Rgb([shade + i; 3]));
            picture.save(folder.join(format!("{i}.png"))).unwrap();
        }
    }
}

/// Class folders are known by their names: in evaluation, where a run goes on, and where another
/// begins with its weights. Test images are measured once, at the end.
#[test]
fn classes_belong_to_the_model() {
    let dir = TempDir::new();
    let [data, other, run_dir] = ["data", "other", "run"].map(|name| dir.path().join(name));
    let shades = [("ant", 20), ("bee", 120), ("cow", 220)];
    for part in ["train", "val", "test"] {
        folders(&data.join(part), &shades);
    }
    let small =
        "--plain --image-size 8 --layers 2 --width 16 --heads 2 --mlp 16 --batch 10 --threads 1";
    let flags = format!("train {small} --checkpoint-interval 30 --data {}", data.display());
    let summary = json(&good(&run_dir, &format!("{flags} --epochs 60 --json")));
    assert_eq!((&summary["accuracy"], &summary["test_accuracy"]), (&1.0.into(), &1.0.into()));
    let curve = metrics(&run_dir, "items_per_s");
    assert!(curve.iter().all(|m| m.get("test_accuracy").is_none()));

    let eval = |data: &Path| {
        let o = Command::new(PROGRAM)
            .args(["eval", "--json", "--weights"])
            .args([run_dir.as_path(), Path::new("--data"), data])
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&o.stderr).into_owned();
        (o.status.code(), told, String::from_utf8(o.stdout).unwrap())
    };
    // Of a folder of test images alone, all are measured.
    let (code, told, out) = eval(&data.join("test"));
    assert!(code == Some(0) && out.contains("30 images"), "{told}{out}");
    assert!(told.contains("all of it is held out"), "{told}");
    // Fewer classes, whose order is another one without the first.
    folders(&other, &shades[1..]);
    let (code, told, out) = eval(&other);
    assert_eq!((code, &json(&out)["accuracy"]), (Some(0), &1.0.into()), "{told}");
    std::fs::rename(other.join("bee"), other.join("wasp")).unwrap();
    let (code, told, _) = eval(&other);
    assert_eq!(code, Some(1));
    for part in ["does not have: \"wasp\"", "\"ant\", \"bee\", \"cow\"", "\"cow\", \"wasp\""] {
        assert!(told.contains(part), "{told}");
    }

    // Weights with other classes, and a run whose classes were renamed.
    let weights = format!("--epochs 1 --weights {}", run_dir.display());
    let o =
        run(&dir.path().join("a"), &format!("train {small} {weights} --data {}", other.display()));
    let told = String::from_utf8_lossy(&o.stderr).into_owned();
    assert!(o.status.code() == Some(1) && told.contains("does not have: \"wasp\""), "{told}");
    for part in ["train", "val", "test"] {
        std::fs::rename(data.join(part).join("ant"), data.join(part).join("gnu")).unwrap();
    }
    let o = resume().arg(&run_dir).output().unwrap();
    let told = String::from_utf8_lossy(&o.stderr).into_owned();
    assert!(o.status.code() == Some(1) && told.contains("does not have: \"gnu\""), "{told}");
}

#[test]
fn experiments_in_small() {
    let dir = TempDir::new();
    let flags = format!("{SMALL} --epochs 1 --seeds 1");
    for name in [
        "accuracy",
        "gamma",
        "robustness",
        "reconstruction",
        "precision",
        "inference",
        "regularizers",
    ] {
        good(dir.path(), &format!("experiment {name} {flags}"));
        for end in [".csv", "-runs.csv", ".svg"] {
            assert!(dir.path().join(format!("{name}{end}")).is_file(), "{name}{end}");
        }
    }
    // Nothing is run twice: a second call says the same, although it could not train.
    let csv = std::fs::read(dir.path().join("accuracy-runs.csv")).unwrap();
    let o = run(dir.path(), &format!("experiment accuracy {flags}"));
    assert!(o.status.success() && !String::from_utf8_lossy(&o.stderr).contains("with seed"));
    assert_eq!(csv, std::fs::read(dir.path().join("accuracy-runs.csv")).unwrap());
    for chosen in ["--seed 3", "--network vit", "--quantize", "--json"] {
        let o = run(dir.path(), &format!("experiment accuracy {flags} {chosen}"));
        let flag = chosen.split(' ').next().unwrap();
        let told = String::from_utf8_lossy(&o.stderr).into_owned();
        assert!(o.status.code() == Some(1) && told.contains(flag), "{told}");
    }
    let o = run(dir.path(), &format!("experiment accuracy {flags} --lr 0.5"));
    assert_eq!(o.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&o.stderr).contains("other flags"));
    // The exact rows of the reconstruction are exact.
    let csv = std::fs::read_to_string(dir.path().join("reconstruction-runs.csv")).unwrap();
    let exact: Vec<_> = csv.lines().filter(|l| l.starts_with("rebuild-bdia")).collect();
    assert!(exact.len() == 5 && exact.iter().all(|l| l.ends_with(",0")), "{csv}");
}

#[test]
fn mistakes_are_told_with_exit_code_1() {
    let dir = TempDir::new();
    for (flags, expected) in [
        ("train --data /nowhere/at/all", "/nowhere/at/all"),
        ("train --batch 5000", "expected at least a batch of 5000"),
        ("train --patch 3", "image height"),
        ("train --heads 5", "heads"),
        ("train --memory 1kB", "does not fit"),
        ("train --epochs 1048576 --batch 1 --lr NaN", "found NaN"),
    ] {
        let o = run(&dir.path().join("x"), flags);
        let text = String::from_utf8_lossy(&o.stderr).into_owned();
        assert_eq!(o.status.code(), Some(1), "{flags}: {text}");
        assert!(text.contains(expected) && !text.contains("panicked"), "{flags}: {text}");
    }
}
