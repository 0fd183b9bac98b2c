//! Files of every kind, good and bad.
#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::path::Path;

use bdia_models::files::testing::TempDir;
use bdia_vit::data::{DataError, Dataset};

fn refused(dir: &Path, parts: &[&str]) -> DataError {
    let error = Dataset::open(dir, 8).unwrap_err();
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "expected {part:?} in: {text}");
    }
    error
}

#[test]
fn the_digits_are_split_by_class() {
    let d = Dataset::digits().unwrap();
    assert_eq!(
        (d.train.len() + d.test.len(), d.train.shape, d.classes.len()),
        (1797, [1, 8, 8], 10)
    );
    for class in 0..10 {
        let count = |l: &[u16]| l.iter().filter(|&&x| x == class).count();
        let (held, all) = (count(&d.test.labels), count(&d.test.labels) + count(&d.train.labels));
        assert_eq!(held, all / 5);
    }
    assert_eq!(d.digest(), Dataset::digits().unwrap().digest());
    let some = d.train.subset(50);
    assert!((0..10).all(|class| some.labels.iter().filter(|&&x| x == class).count() == 5));
}

fn cifar(labels: &[u8], bytes: usize) -> Vec<u8> {
    labels.iter().flat_map(|&l| vec![l; bytes]).collect()
}

#[test]
fn cifar_files() {
    let dir = TempDir::new();
    dir.file("data_batch_1.bin", &cifar(&[1, 2, 9], 3073));
    dir.file("data_batch_2.bin", &cifar(&[4], 3073));
    dir.file("test_batch.bin", &cifar(&[0, 7], 3073));
    let d = Dataset::open(dir.path(), 8).unwrap();
    assert_eq!(
        (d.train.labels.as_slice(), d.test.labels.as_slice()),
        (&[1, 2, 9, 4][..], &[0, 7][..])
    );
    assert_eq!((d.train.shape, d.train.image(3)[0], d.classes.len()), ([3, 32, 32], 4, 10));
    dir.file("test_batch.bin", &cifar(&[0, 10], 3073));
    let e = refused(dir.path(), &["test_batch.bin", "record 1", "label 10", "0 to 9"]);
    assert!(matches!(e, DataError::Label { record: 1, found: 10, most: 9, .. }));
    dir.file("test_batch.bin", &cifar(&[0], 3072));
    refused(dir.path(), &["test_batch.bin", "3072 bytes", "multiple of 3073"]);
    dir.file("test_batch.bin", b"");
    refused(dir.path(), &["test_batch.bin", "0 bytes"]);

    let dir = TempDir::new();
    dir.file("train.bin", &cifar(&[3, 99], 3074));
    dir.file("test.bin", &cifar(&[5], 3074));
    let d = Dataset::open(dir.path(), 8).unwrap();
    assert_eq!((d.train.labels.as_slice(), d.classes.len()), (&[3, 99][..], 100));
    dir.file("test.bin", &cifar(&[100], 3074));
    refused(dir.path(), &["test.bin", "record 0", "label 100", "0 to 99"]);
}

fn idx(magic: u32, sizes: &[u32], data: &[u8]) -> Vec<u8> {
    let mut bytes = magic.to_be_bytes().to_vec();
    sizes.iter().for_each(|s| bytes.extend(s.to_be_bytes()));
    bytes.extend(data);
    bytes
}

#[test]
fn idx_files() {
    let dir = TempDir::new();
    let images = idx(0x803, &[2, 2, 3], &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
    let labels = idx(0x801, &[2], &[3, 1]);
    for part in ["train", "t10k"] {
        dir.file(&format!("{part}-images-idx3-ubyte"), &images);
        dir.file(&format!("{part}-labels-idx1-ubyte"), &labels);
    }
    let plain = Dataset::open(dir.path(), 8).unwrap();
    assert_eq!(
        (plain.train.shape, plain.train.image(1), plain.classes.len()),
        ([1, 2, 3], &[7, 8, 9, 10, 11, 12][..], 4)
    );
    dir.file("t10k-images-idx3-ubyte", &images[..20]);
    refused(dir.path(), &["t10k-images-idx3-ubyte", "promises 12 values, found only: 4"]);
    dir.file("t10k-images-idx3-ubyte", &idx(0x803, &[u32::MAX, u32::MAX, 9], &[]));
    refused(dir.path(), &["t10k-images-idx3-ubyte", "claims"]);
    dir.file("t10k-images-idx3-ubyte", &idx(0x802, &[1, 2, 2], &[0; 4]));
    refused(dir.path(), &["0x00000802", "expected 0x00000803"]);
    dir.file("t10k-images-idx3-ubyte", &idx(0x803, &[1, 2, 3], &[0; 6]));
    refused(dir.path(), &["2 labels for 1 images"]);

    let gz = TempDir::new();
    let packed = |bytes: &[u8]| {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    };
    for part in ["train", "t10k"] {
        gz.file(&format!("{part}-images-idx3-ubyte.gz"), &packed(&images));
        gz.file(&format!("{part}-labels-idx1-ubyte.gz"), &packed(&labels));
    }
    assert_eq!(Dataset::open(gz.path(), 8).unwrap().train, plain.train);
    let mut damaged = packed(&images);
    let half = damaged.len() / 2;
    damaged.truncate(half);
    gz.file("train-images-idx3-ubyte.gz", &damaged);
    refused(gz.path(), &["train-images-idx3-ubyte.gz"]);
}

fn png(side: u32, colour: u8) -> Vec<u8> {
    let mut out = std::io::Cursor::new(Vec::new());
    image::RgbImage::from_pixel(side, side, image::Rgb([colour; 3]))
        .write_to(&mut out, image::ImageFormat::Png)
        .unwrap();
    out.into_inner()
}

#[test]
fn folders_of_pictures() {
    let dir = TempDir::new();
    for (class, colour) in [("cat", 10), ("dog", 200)] {
        std::fs::create_dir(dir.path().join(class)).unwrap();
        for i in 0..10 {
            dir.file(&format!("{class}/{i}.png"), &png(12, colour + i));
        }
    }
    let d = Dataset::open(dir.path(), 8).unwrap();
    assert_eq!((d.train.len(), d.test.len(), d.train.shape), (16, 4, [3, 8, 8]));
    assert_eq!(d.classes, ["cat", "dog"]);
    assert!((10..20).contains(&d.train.image(0)[0]));

    dir.file("dog/bad.jpg", &[0xff, 0xd8, 0xff, 0xe0, 0, 16, b'J', b'F', b'I', b'F', 0, 1, 1, 0]);
    refused(dir.path(), &["bad.jpg", "PNG or JPEG"]);
    // A picture that claims more pixels than anybody has.
    let mut bomb = png(12, 1);
    bomb[16..20].copy_from_slice(&60_000_u32.to_be_bytes());
    bomb[20..24].copy_from_slice(&60_000_u32.to_be_bytes());
    let crc = crc32(&bomb[12..29]);
    bomb[29..33].copy_from_slice(&crc.to_be_bytes());
    std::fs::remove_file(dir.path().join("dog/bad.jpg")).unwrap();
    dir.file("dog/bomb.png", &bomb);
    refused(dir.path(), &["bomb.png"]);
    std::fs::remove_file(dir.path().join("dog/bomb.png")).unwrap();
    std::fs::create_dir(dir.path().join("empty")).unwrap();
    refused(dir.path(), &["empty", "the folder of a class is empty"]);
    let nothing = TempDir::new();
    refused(nothing.path(), &["0 class folders"]);
    refused(&nothing.path().join("absent"), &["absent", "cannot read the directory"]);
}

/// The checksum of PNG's chunks.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |c: u32| if c & 1 == 1 { c >> 1 ^ 0xedb8_8320 } else { c >> 1 };
    !bytes.iter().fold(!0_u32, |c, &b| (0..8).fold(c ^ u32::from(b), |c, _| step(c)))
}
