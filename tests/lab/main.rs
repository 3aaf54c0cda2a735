//! End-to-end tests: real kernel, real programs, two nodes.

mod addresses;
mod enrolment;
mod identity;
mod joined;
mod kit;
mod lifecycle;
mod operate;
mod policy;
mod programs;
mod requests;
mod resource;
mod smoke;
mod streams;
