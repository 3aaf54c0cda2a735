//! Kubernetes objects as `kubectl get -o yaml` prints them. Fields that Postern
//! does not use are passed over: their meaning is Kubernetes' business.

use k8s_openapi::api::{
    core::v1::{Namespace, Pod, Service},
    discovery::v1::EndpointSlice,
};
use serde::{Deserialize, Deserializer};

use crate::objects::{Head, Object, ignore};

#[derive(Clone, Debug)]
pub enum WorkloadObject {
    Pod(Box<Pod>),
    Service(Box<Service>),
    EndpointSlice(Box<EndpointSlice>),
    Namespace(Box<Namespace>),
}

impl Object for WorkloadObject {
    fn read<'de, D: Deserializer<'de>>(head: &Head, from: D) -> Result<Option<Self>, D::Error> {
        Ok(Some(match (head.api_version.as_str(), head.kind.as_str()) {
            ("v1", "Pod") => Self::Pod(Deserialize::deserialize(from)?),
            ("v1", "Service") => Self::Service(Deserialize::deserialize(from)?),
            ("v1", "Namespace") => Self::Namespace(Deserialize::deserialize(from)?),
            ("discovery.k8s.io/v1", "EndpointSlice") => {
                Self::EndpointSlice(Deserialize::deserialize(from)?)
            }
            // Other kinds say nothing about what runs where.
            _ => {
                ignore(from)?;
                return Ok(None);
            }
        }))
    }
}
