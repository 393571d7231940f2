//! The probe guest: hardware, start and end. Everything else is the library of this package.
//!
//! Exit statuses: 0 all orders were as they should be, 1 some weren't, 2 bad orders or settings, 3 no usable
//! NIC, 4 panic or exception.
#![no_std]
#![no_main]

extern crate alloc;

mod machine;
