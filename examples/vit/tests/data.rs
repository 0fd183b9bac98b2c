//! Files of every kind, good and bad.
#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::path::Path;

use bdia_models::files::testing::TempDir;
use bdia_vit::data::{DataError, Dataset, decode};

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

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
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
    for part in ["train", "t10k"] {
        gz.file(&format!("{part}-images-idx3-ubyte.gz"), &gzip(&images));
        gz.file(&format!("{part}-labels-idx1-ubyte.gz"), &gzip(&labels));
    }
    assert_eq!(Dataset::open(gz.path(), 8).unwrap().train, plain.train);
    // Unpacked beside the archive, as torchvision leaves them: the plain file is read.
    let raw = TempDir::new();
    for part in ["train", "t10k"] {
        for (name, bytes) in [("images-idx3-ubyte", &images), ("labels-idx1-ubyte", &labels)] {
            raw.file(&format!("{part}-{name}"), bytes);
            raw.file(&format!("{part}-{name}.gz"), b"not read");
        }
    }
    assert_eq!(Dataset::open(raw.path(), 8).unwrap().train, plain.train);
    // Of what is packed no more is read than the header promises: the damage behind is not seen.
    let noise: Vec<u8> =
        (1..100_000_u32).map(|i| (i.wrapping_mul(0x9e37_79b1) >> 24) as u8).collect();
    let mut more = gzip(&[images.as_slice(), &noise].concat());
    more.truncate(more.len() / 2);
    gz.file("t10k-images-idx3-ubyte.gz", &more);
    refused(gz.path(), &["t10k-images-idx3-ubyte.gz", "promises 12 values, found more"]);
    gz.file("t10k-images-idx3-ubyte.gz", &gzip(&images));
    let mut damaged = gzip(&images);
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

/// Class folders with a picture of each colour, in `dir/place`.
fn classes(dir: &TempDir, place: &str, of: &[(&str, u8)], count: u8) {
    for (class, colour) in of {
        std::fs::create_dir_all(dir.path().join(place).join(class)).unwrap();
        for i in 0..count {
            dir.file(&format!("{place}/{class}/{i}.png"), &png(8, colour + i));
        }
    }
}

#[test]
fn classes_are_those_of_the_model() {
    let dir = TempDir::new();
    classes(&dir, ".", &[("cat", 10), ("dog", 200)], 5);
    let names = |all: &[&str]| all.iter().map(ToString::to_string).collect::<Vec<_>>();
    let open = || Dataset::open(dir.path(), 8).unwrap();
    let model = Path::new("runs/vit");
    // Whatever the order, and however many more the model has.
    let d = open().with_classes(model, &names(&["dog", "bird", "cat"])).unwrap();
    assert_eq!(d.classes, ["dog", "bird", "cat"]);
    for (images, i) in [(&d.train, 0), (&d.train, d.train.len() - 1), (&d.test, 0), (&d.test, 1)] {
        assert_eq!(images.labels[i], if images.image(i)[0] < 100 { 2 } else { 0 });
    }
    for unknown in [&["kitten", "dog"][..], &["0", "1"]] {
        let e = open().with_classes(model, &names(unknown)).unwrap_err();
        assert!(matches!(e, DataError::Classes { .. }));
        for part in ["runs/vit", "\"cat\"", "\"dog\"", unknown[0]] {
            assert!(e.to_string().contains(part), "{e}");
        }
    }

    // Files of numbers go by number where one side has no names; a model of fewer classes does not.
    let d = Dataset::digits().unwrap();
    let words = names(&["o", "i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix"]);
    let named = d.clone().with_classes(model, &words).unwrap();
    assert_eq!((&named.test.labels, named.notes.len()), (&d.test.labels, 1));
    let e = d.with_classes(model, &words[..9]).unwrap_err();
    assert!(matches!(e, DataError::Classes { .. }));
}

#[test]
fn some_of_cifar() {
    let dir = TempDir::new();
    std::fs::create_dir(dir.path().join("cifar-10-batches-bin")).unwrap();
    let inner = |name: &str| format!("cifar-10-batches-bin/{name}");
    dir.file(&inner("data_batch_3.bin.gz"), &gzip(&cifar(&[1, 2], 3073)));
    refused(dir.path(), &["data_batch_1.bin is there, test_batch.bin is not"]);
    dir.file(&inner("TEST_BATCH.BIN"), &cifar(&[0], 3073));
    dir.file(&inner("batches.meta.txt"), "\u{feff}a\nb\nc\nd\ne\nf\ng\nh\ni\nj\n\n".as_bytes());
    let d = Dataset::open(dir.path(), 8).unwrap();
    assert_eq!((d.train.labels.as_slice(), d.classes[0].as_str()), (&[1, 2][..], "a"));
    let [note] = d.notes.as_slice() else { panic!("{:?}", d.notes) };
    assert!(
        note.contains("\"data_batch_1.bin\", \"data_batch_2.bin\", \"data_batch_4.bin\"")
            && note.contains("goes on with \"data_batch_3.bin\""),
        "{note}"
    );
    // More batches than CIFAR-10 has are read too, in the order of their numbers.
    dir.file(&inner("data_batch_10.bin"), &cifar(&[9], 3073));
    dir.file(&inner("data_batch_6.bin"), &cifar(&[6], 3073));
    let d = Dataset::open(dir.path(), 8).unwrap();
    assert_eq!(d.train.labels, [1, 2, 6, 9]);
    assert!(d.notes[0].contains("\"data_batch_6.bin\", \"data_batch_10.bin\""), "{:?}", d.notes);
    dir.file(&inner("batches.meta.txt"), b"a\nb\n");
    refused(dir.path(), &["batches.meta.txt", "2 names of classes, expected 10"]);

    let python = TempDir::new();
    python.file("data_batch_1", b"\x80\x02");
    refused(python.path(), &["for Python", "binary version"]);
    let hundred = TempDir::new();
    hundred.file("train.bin", &cifar(&[3], 3074));
    refused(hundred.path(), &["train.bin is there, test.bin is not"]);
    let packed = TempDir::new();
    packed.file("pictures.zip", b"PK");
    refused(packed.path(), &[&format!("unpack {}", packed.path().join("pictures.zip").display())]);
    // As the archives are unpacked.
    for files in [&["data_batch_1", "batches.meta"][..], &["train", "test", "meta"]] {
        let python = TempDir::new();
        std::fs::create_dir(python.path().join("cifar-python")).unwrap();
        files.iter().for_each(|name| drop(python.file(&format!("cifar-python/{name}"), b"\x80")));
        python.file("cifar-python.tar.gz", b"");
        refused(python.path(), &["for Python", "binary version"]);
    }
}

#[test]
fn idx_files_as_kaggle_names_them() {
    let dir = TempDir::new();
    let images = idx(0x803, &[1, 2, 2], &[1, 2, 3, 4]);
    let labels = idx(0x801, &[1], &[3]);
    for part in ["train", "t10k"] {
        dir.file(&format!("{part}-images.idx3-ubyte"), &gzip(&images));
        let folder = format!("{part}-labels-idx1-ubyte");
        std::fs::create_dir(dir.path().join(&folder)).unwrap();
        dir.file(&format!("{folder}/{folder}"), &labels);
    }
    let d = Dataset::open(dir.path(), 8).unwrap();
    assert_eq!((d.train.image(0), d.test.labels.as_slice()), (&[1, 2, 3, 4][..], &[3][..]));
    dir.file("emnist-train-images-idx3-ubyte", &images);
    refused(dir.path(), &["expected one file of train-images", "emnist"]);
}

#[test]
fn what_systems_leave_behind_is_passed_over() {
    let dir = TempDir::new();
    classes(&dir, ".", &[("cat", 10), ("dog", 200), ("__MACOSX", 1), (".cache", 1)], 5);
    for name in ["cat/Thumbs.db", "cat/desktop.ini", "dog/README.txt", "dog/._0.png", "licence.md"]
    {
        dir.file(name, b"nothing");
    }
    std::fs::create_dir_all(dir.path().join("dog/more/deep")).unwrap();
    dir.file("dog/more/deep/a.PNG", &png(8, 250));
    dir.file("dog/0.JPEG", &png(8, 251));
    let d = Dataset::open(dir.path(), 8).unwrap();
    assert_eq!(
        (d.classes.as_slice(), d.train.len() + d.test.len()),
        (&["cat", "dog"].map(String::from)[..], 12)
    );
    let [note] = d.notes.as_slice() else { panic!("{:?}", d.notes) };
    let begin = "passed over 7 file(s) or folder(s) that are not data: ";
    assert!(note.starts_with(begin) && note.contains("\"Thumbs.db\""), "{note}");

    dir.file("cat/x.webp", b"RIFF");
    refused(dir.path(), &["x.webp", "convert it to PNG or JPEG"]);
}

#[test]
fn parts_are_used_for_what_they_are() {
    let both = [("cat", 10), ("dog", 200)];
    for (train, validation, test) in [
        ("train", "val", "test"),
        ("Train", "Validation", "TEST"),
        ("seg_train", "valid", "test_set"),
    ] {
        let dir = TempDir::new();
        // One of them as Kaggle has it.
        classes(&dir, &format!("{train}/{train}"), &both, 4);
        classes(&dir, validation, &both[1..], 3);
        classes(&dir, test, &both, 2);
        classes(&dir, "pred", &[], 0);
        let d = Dataset::open(dir.path(), 8).unwrap();
        let held = d.validation.as_ref().unwrap();
        assert_eq!((d.train.len(), held.len(), d.test.len()), (8, 3, 4));
        assert_eq!((held.labels.as_slice(), d.held_out()), (&[1, 1, 1][..], held));
        // Validation images are what is held out where there are no others.
        std::fs::remove_dir_all(dir.path().join(test)).unwrap();
        let without = Dataset::open(dir.path(), 8).unwrap();
        assert_eq!((&without.test, &without.validation), (held, &None));
        assert_ne!(without.digest(), d.digest());
    }
    let dir = TempDir::new();
    classes(&dir, "train", &both, 5);
    assert_eq!(Dataset::open(dir.path(), 8).unwrap().test.len(), 2);
    classes(&dir, "test", &[("bird", 1), ("cat", 1)], 1);
    refused(dir.path(), &["bird", "no such class"]);
    // A folder alone that is no class has pictures without labels; of a class, with them.
    std::fs::remove_dir_all(dir.path().join("test/cat")).unwrap();
    for name in ["bird", "test", "images"] {
        std::fs::rename(dir.path().join("test/bird"), dir.path().join("test").join(name)).unwrap();
        let d = Dataset::open(dir.path(), 8).unwrap();
        assert!(d.test.len() == 2 && d.notes[0].contains("no labels"), "{:?}", d.notes);
        std::fs::rename(dir.path().join("test").join(name), dir.path().join("test/bird")).unwrap();
    }
    std::fs::rename(dir.path().join("test/bird"), dir.path().join("test/cat")).unwrap();
    assert_eq!(Dataset::open(dir.path(), 8).unwrap().test.labels, [0]);
    std::fs::remove_dir_all(dir.path().join("test/cat")).unwrap();
    dir.file("test/1.png", &png(8, 1));
    let d = Dataset::open(dir.path(), 8).unwrap();
    assert!(d.test.len() == 2 && d.notes[0].contains("no labels"), "{:?}", d.notes);
    std::fs::rename(dir.path().join("train"), dir.path().join("val")).unwrap();
    std::fs::create_dir(dir.path().join("test/cat")).unwrap();
    refused(dir.path(), &["it is no class"]);
    classes(&dir, "train", &both, 1);
    classes(&dir, "training", &both, 1);
    refused(dir.path(), &["is for the same"]);
}

/// A folder for validation or testing that is alone is no data to train on, and all of it is
/// evaluated, whether it is named or the one around it.
#[test]
fn a_part_alone() {
    for name in ["test", "val"] {
        let dir = TempDir::new();
        classes(&dir, name, &[("cat", 10), ("dog", 200)], 5);
        refused(dir.path(), &[name, "it is for validation or testing"]);
        let part = dir.path().join(name);
        for place in [dir.path(), &part] {
            let d = Dataset::open_to_evaluate(place, 8).unwrap();
            assert_eq!((d.train.len(), d.test.len(), d.test.shape), (0, 10, [3, 8, 8]));
            assert!(d.notes[0].contains("all of it is held out"), "{:?}", d.notes);
        }
        // Named to train on, it is.
        assert_eq!(Dataset::open(&part, 8).unwrap().train.len(), 8);
        // With a folder for training beside it, or of another name, it is as ever.
        classes(&dir, "train", &[("cat", 10), ("dog", 200)], 5);
        let both = [Dataset::open, Dataset::open_to_evaluate].map(|f| f(dir.path(), 8).unwrap());
        assert_eq!((both[0].train.len(), &both[0]), (10, &both[1]));
        let train = dir.path().join("train");
        assert_eq!(Dataset::open_to_evaluate(&train, 8).unwrap().test.len(), 2);
    }
}

#[test]
fn pictures_of_every_kind() {
    let decoded = |bytes: &[u8]| decode(Path::new("a"), bytes, 2).unwrap();
    let png = |picture: image::DynamicImage| {
        let mut out = std::io::Cursor::new(Vec::new());
        picture.write_to(&mut out, image::ImageFormat::Png).unwrap();
        out.into_inner()
    };
    // Grey, and 16 bits of it, are three equal channels.
    let grey = [0_u8, 60, 120, 255];
    let expected = [grey, grey, grey].concat();
    let one = image::GrayImage::from_raw(2, 2, grey.to_vec()).unwrap();
    assert_eq!(decoded(&png(one.clone().into())), expected);
    let deep = grey.map(|g| u16::from(g) * 257).to_vec();
    let deep = image::ImageBuffer::<image::Luma<u16>, _>::from_raw(2, 2, deep).unwrap();
    assert_eq!(decoded(&png(deep.into())), expected);

    // A camera that was turned: the picture is the one without the mark, turned back.
    let mut wide = image::RgbImage::from_pixel(16, 16, image::Rgb([255; 3]));
    (0..16)
        .flat_map(|x| (0..8).map(move |y| (x, y)))
        .for_each(|(x, y)| wide.get_pixel_mut(x, y).0 = [0; 3]);
    let mut jpeg = std::io::Cursor::new(Vec::new());
    wide.write_to(&mut jpeg, image::ImageFormat::Jpeg).unwrap();
    let jpeg = jpeg.into_inner();
    let top = decoded(&jpeg);
    assert!(top[0] < 64 && top[1] < 64 && top[2] > 192 && top[3] > 192, "{top:?}");
    // Orientation 6: the top of the scene is at the right of the rows.
    let mut exif =
        b"\xff\xe1\0\x22Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
            .to_vec();
    assert_eq!(exif.len(), 36);
    exif.extend(&jpeg[2..]);
    let turned = decoded(&[&jpeg[..2], &exif].concat());
    assert!(turned[1] < 64 && turned[3] < 64 && turned[0] > 192 && turned[2] > 192, "{turned:?}");

    // Four inks as Adobe writes them, where 255 is none: white, and black.
    for (level, expected) in [(0x00_u8, 0), (0xff, 255)] {
        let pixels = decoded(&cmyk(level));
        assert!(pixels.iter().all(|p| p.abs_diff(expected) < 4), "{pixels:?}");
    }
}

/// A baseline JPEG of 8×8 pixels in four components, all of them about `level`.
fn cmyk(level: u8) -> Vec<u8> {
    let mut out = vec![0xff, 0xd8];
    let mut segment = |marker: u8, body: &[u8]| {
        out.extend([0xff, marker]);
        out.extend((body.len() as u16 + 2).to_be_bytes());
        out.extend(body);
    };
    segment(0xee, b"Adobe\0\x64\0\0\0\0\0");
    segment(0xdb, &[&[0][..], &[8; 64]].concat());
    segment(0xc0, &[8, 0, 8, 0, 8, 4, 1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0, 4, 0x11, 0]);
    // One code of one bit each: a difference of 7 bits, and the end of a block.
    let table = |class: u8, value: u8| [&[class, 1][..], &[0; 15], &[value]].concat();
    segment(0xc4, &table(0x00, 7));
    segment(0xc4, &table(0x10, 0));
    segment(0xda, &[4, 1, 0, 2, 0, 3, 0, 4, 0, 0, 63, 0]);
    // Difference +127 or -127 in units of 8·8 / 8: half of the range up or down.
    let amplitude = if level > 0x7f { "1111111" } else { "0000000" };
    let bits = format!("0{amplitude}0").repeat(4) + "1111";
    for byte in bits.as_bytes().chunks(8) {
        let byte = byte.iter().fold(0, |n, b| n << 1 | (b - b'0'));
        out.push(byte);
        if byte == 0xff {
            out.push(0);
        }
    }
    out.extend([0xff, 0xd9]);
    out
}

/// The checksum of PNG's chunks.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |c: u32| if c & 1 == 1 { c >> 1 ^ 0xedb8_8320 } else { c >> 1 };
    !bytes.iter().fold(!0_u32, |c, &b| (0..8).fold(c ^ u32::from(b), |c, _| step(c)))
}
