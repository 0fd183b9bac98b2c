//! What is done with arbitrary bytes, and what must then hold. Used by the fuzz targets, and by
//! `tests/fuzz_seeds.rs` for the seeds and mutations of them.
#![allow(dead_code)]

use std::path::Path;

use bdia_models::vit::config::VitConfig;
use bdia_vit::data::{Images, cifar_records, decode, idx_values};

/// An IDX file of images, plain or packed. Accepted: as many values as its sizes say.
pub fn idx(data: &[u8]) {
    let path = Path::new("train-images-idx3-ubyte");
    if let Ok((sizes, values)) = idx_values(path, data, 0x0803, 3) {
        assert_eq!(sizes.iter().product::<usize>(), values.len());
    }
}

/// A file of CIFAR's records, with one label byte and with two. Accepted: all bytes are images or
/// labels.
pub fn cifar(data: &[u8]) {
    for (labels, classes) in [(1, 10), (2, 100)] {
        let mut images = Images { shape: [3, 32, 32], ..Images::default() };
        if cifar_records(Path::new("data_batch_1.bin"), data, labels, classes, &mut images).is_ok()
        {
            assert_eq!(images.pixels.len() + labels * images.labels.len(), data.len());
            assert!(images.labels.iter().all(|&l| l < classes));
        }
    }
}

/// A PNG or JPEG. Accepted: it has the size that was asked for.
pub fn picture(data: &[u8]) {
    if let Ok(pixels) = decode(Path::new("a.png"), data, 8) {
        assert_eq!(pixels.len(), 3 * 8 * 8);
    }
}

/// A `config.json`. Accepted: written and read again, it is the same.
pub fn config(data: &[u8]) {
    let path = Path::new("config.json");
    if let Ok(config) = VitConfig::from_json(path, data) {
        let again = serde_json::to_vec(&config).expect("it was read");
        assert_eq!(VitConfig::from_json(path, &again).expect("it was written"), config);
    }
}
