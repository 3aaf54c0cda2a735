//! The endpoints as clients see them: through the router, at a time that is set.

mod clients;
mod exchange;
mod faults;
mod grants;
mod keys;
mod kit;
mod postgres;
mod tokens;
