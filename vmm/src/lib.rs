//! Pontoon: a small KVM virtual machine monitor whose guests are on the network the moment they boot.
