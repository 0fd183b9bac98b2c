//! What ends the program with exit code 1.

pub use bdia_train::Failure;

use crate::adapter::AdapterError;
use crate::config::ConfigError;
use crate::data::DataError;
use crate::hub::HubError;
use crate::pairs::PairsError;
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

impl From<AdapterError> for Failure {
    fn from(error: AdapterError) -> Self {
        Self::Program(Box::new(error))
    }
}

impl From<HubError> for Failure {
    fn from(error: HubError) -> Self {
        Self::Program(Box::new(error))
    }
}

impl From<PairsError> for Failure {
    fn from(error: PairsError) -> Self {
        Self::Program(Box::new(error))
    }
}
