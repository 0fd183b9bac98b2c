//! NCCL where it is not installed: an error in words. Where it is, with a device, a single rank.
#![cfg(feature = "nccl")]
#![allow(clippy::unwrap_used)]

use core::time::Duration;

use bdia_core::Error;
use bdia_ranks::Ranks;
use bdia_ranks::nccl::Nccl;

#[test]
fn what_is_missing_is_said() {
    match Ranks::start(|| Nccl::open(Duration::from_secs(5), 0)) {
        Ok(ranks) => {
            assert_eq!((ranks.rank(), ranks.ranks()), (0, 1));
            ranks.close();
        }
        Err(Error::Device(what)) => {
            assert!(what.contains("is not installed") || what.contains("CUDA device"), "{what}")
        }
        Err(other) => panic!("{other}"),
    }
}
