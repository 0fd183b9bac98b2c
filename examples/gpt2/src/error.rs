//! What ends the program with exit code 1.

pub use bdia_train::Failure;

use crate::config::ConfigError;
use crate::data::DataError;
use crate::sample::SampleError;

impl From<DataError> for Failure {
    fn from(error: DataError) -> Self {
        Self::Program(Box::new(error))
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::Program(Box::new(error))
    }
}

impl From<SampleError> for Failure {
    fn from(error: SampleError) -> Self {
        Self::Program(Box::new(error))
    }
}
