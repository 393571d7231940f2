//! The probe guest, the init of our Linux images and the builder of those images.
