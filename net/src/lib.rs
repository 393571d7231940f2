//! Frames, sockets, TAPs and bridges: what a virtual NIC is plugged into.
