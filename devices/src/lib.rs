//! Registers, virtqueues and guest memory: the devices of a Pontoon machine.
