//! End-to-end tests: real kernel, real programs, two nodes.

mod smoke;
