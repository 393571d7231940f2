//! Any sequence of requests leaves what a plain array of bytes would hold.

use proptest::prelude::*;

use super::*;

/// Not a whole number of clusters.
const SECTORS: u64 = 83;

#[derive(Clone, Debug)]
enum Step {
    Read { sector: u64, sectors: usize, cut: usize },
    Write { sector: u64, sectors: usize, cut: usize, seed: u8 },
    Zero { sector: u64, sectors: usize, unmap: bool },
    Discard { sector: u64, sectors: usize },
    Flush,
    Reset,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let place = || {
        (0..SECTORS)
            .prop_flat_map(|sector| (Just(sector), 1..=usize::try_from(SECTORS - sector).unwrap().min(40)))
    };
    // Many are whole pages, as a file system's are.
    let paged = || {
        (0..SECTORS / 8, 1_usize..4)
            .prop_map(|(page, pages)| (page * 8, pages.min((SECTORS / 8 - page) as usize) * 8))
    };
    let place = move || prop_oneof![place(), paged()];
    let step = prop_oneof![
        4 => (place(), 0_usize..2000).prop_map(|((sector, sectors), cut)| Step::Read { sector, sectors, cut }),
        6 => (place(), 0_usize..2000, any::<u8>())
            .prop_map(|((sector, sectors), cut, seed)| Step::Write { sector, sectors, cut, seed }),
        2 => (place(), any::<bool>()).prop_map(|((sector, sectors), unmap)| Step::Zero { sector, sectors, unmap }),
        2 => place().prop_map(|(sector, sectors)| Step::Discard { sector, sectors }),
        1 => Just(Step::Flush),
        1 => Just(Step::Reset),
    ];
    proptest::collection::vec(step, 1..40)
}

/// The bytes that the disk must have; those that were discarded may also be zero.
struct Model {
    bytes: Vec<u8>,
    discarded: Vec<bool>,
}

impl Model {
    fn check(&mut self, at: usize, got: &[u8]) {
        for (offset, byte) in got.iter().enumerate() {
            let at = at + offset;
            if self.discarded[at] && *byte == 0 {
                self.bytes[at] = 0;
            }
            assert_eq!(self.bytes[at], *byte, "byte {at}");
        }
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        self.discarded[at..at + bytes.len()].fill(false);
    }
}

/// `len` bytes of guest memory, in two or three pieces.
fn pieces(len: usize, cut: usize, piece: impl Fn(u64, usize) -> Buf) -> Vec<Buf> {
    let first = cut.min(len);
    let second = cut.min(len - first);
    let parts = [(0, first), (first, second), (first + second, len - first - second)];
    parts.into_iter().filter(|(_, len)| *len > 0).map(|(at, len)| piece(data(0) + at as u64, len)).collect()
}

fn play(guest: &mut Guest, model: &mut Model, step: &Step) {
    match *step {
        Step::Read { sector, sectors, cut } => {
            guest.driver.fill(data(0), &vec![0xaa; sectors * 512]);
            let (status, written) = guest.ask(IN, sector, &pieces(sectors * 512, cut, into));
            assert_eq!((status, written as usize), (OK, sectors * 512 + 1), "{step:?}");
            model.check(sector as usize * 512, &guest.driver.bytes(data(0), sectors * 512));
        }
        Step::Write { sector, sectors, cut, seed } => {
            let bytes: Vec<u8> = (0..sectors * 512).map(|n| (n % 253) as u8 ^ seed).collect();
            guest.driver.fill(data(0), &bytes);
            assert_eq!(guest.ask(OUT, sector, &pieces(bytes.len(), cut, out)), (OK, 1), "{step:?}");
            model.set(sector as usize * 512, &bytes);
        }
        Step::Zero { sector, sectors, unmap } => {
            assert_eq!(guest.trim(ZEROES, &[(sector, sectors as u32, unmap.into())]), OK, "{step:?}");
            model.set(sector as usize * 512, &vec![0; sectors * 512]);
        }
        Step::Discard { sector, sectors } => {
            assert_eq!(guest.trim(DISCARD, &[(sector, sectors as u32, 0)]), OK, "{step:?}");
            model.discarded[sector as usize * 512..][..sectors * 512].fill(true);
        }
        Step::Flush => assert_eq!(guest.ask(FLUSH, 0, &[]), (OK, 1)),
        Step::Reset => guest.driver.start(ALL),
    }
}

fn run(steps: &[Step], mode: DiskMode, uring: bool) {
    let image = image(SECTORS);
    let before = std::fs::read(image.path()).unwrap();
    let mut guest = Guest::new(open(&image, mode), uring);
    let mut model = Model { bytes: before.clone(), discarded: vec![false; before.len()] };
    steps.iter().for_each(|step| play(&mut guest, &mut model, step));
    let all = guest.read(0, before.len()).unwrap();
    model.check(0, &all);
    guest.driver.assert_healthy();
    drop(guest);
    let after = std::fs::read(image.path()).unwrap();
    if mode == DiskMode::Overlay {
        assert_eq!(after, before, "the base");
    } else {
        assert_eq!(after, all, "the file");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn a_raw_disk_is_an_array_of_bytes(steps in steps(), uring: bool) {
        run(&steps, DiskMode::ReadWrite, uring);
    }

    #[test]
    fn an_overlay_is_an_array_of_bytes(steps in steps(), uring: bool) {
        run(&steps, DiskMode::Overlay, uring);
    }

    #[test]
    fn no_chain_makes_the_device_panic_or_hang(
        header in proptest::collection::vec(any::<u8>(), 16..48),
        kind in prop_oneof![0_u32..16, any::<u32>()],
        sector in prop_oneof![0..SECTORS, any::<u64>()],
        bufs in proptest::collection::vec((0_u64..0x4000, 0_u32..5000, 0_u16..8), 1..8),
    ) {
        let image = image(SECTORS);
        let mut guest = Guest::new(open(&image, DiskMode::Overlay), true);
        guest.driver.fill(DATA, &header);
        guest.driver.fill(DATA, &kind.to_le_bytes());
        guest.driver.fill(DATA + 8, &sector.to_le_bytes());
        let bufs: Vec<Buf> = bufs
            .iter()
            .enumerate()
            .map(|(n, (at, len, flags))| Buf {
                addr: if n == 0 { DATA } else { DATA + at },
                len: if n == 0 { (*len).min(64) } else { *len },
                flags: flags & !1,
            })
            .collect();
        guest.driver.add(0, &bufs);
        guest.driver.kick_and_run(0);
        // Whatever that was, a reset leads back to a disk that works.
        guest.driver.start(ALL);
        prop_assert_eq!(guest.read(0, 512).unwrap().len(), 512);
    }
}
