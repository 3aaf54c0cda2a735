//! End-to-end tests: real kernel, real programs, two nodes.

mod addresses;
mod ask;
mod audit;
mod authority;
mod bypass;
mod enrolment;
mod identity;
mod joined;
mod kernel;
mod kit;
mod lifecycle;
mod login;
mod oauth;
mod operate;
mod outbound;
mod page;
mod policy;
mod programs;
mod provider;
mod requests;
mod resource;
mod send;
mod smoke;
mod storm;
mod streams;
mod upgrade;
