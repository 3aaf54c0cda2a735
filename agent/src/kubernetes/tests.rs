//! Tests of the source against an API server double.
