//! Stores with images made by hand: whole, damaged, outdated, half built; and one real build where there is an archive.

use super::*;
use crate::Silent;

/// A store with the imported image `mine`.
fn store_with_import(cache: &Path) -> (Store, Image) {
    let store = Store::open(cache);
    let (kernel, initrd) = (cache.join("k"), cache.join("i"));
    fs::write(&kernel, b"kernel").unwrap();
    fs::write(&initrd, b"initrd").unwrap();
    let image = store.import("mine", &kernel, &initrd, &mut Silent).unwrap();
    (store, image)
}

#[test]
fn imported_image_is_found_and_verified() {
    let cache = tempfile::tempdir().unwrap();
    let (store, image) = store_with_import(cache.path());
    assert_eq!(store.get("mine").unwrap(), image);
    assert_eq!(store.list(), std::slice::from_ref(&image));
    assert_eq!(fs::read(&image.kernel).unwrap(), b"kernel");
    image.verify().unwrap();
    assert!(matches!(store.get("other"), Err(Error::NotBuilt { name }) if name == "other"));
}

#[test]
fn damage_is_named() {
    let cache = tempfile::tempdir().unwrap();
    let (store, image) = store_with_import(cache.path());
    fs::write(&image.kernel, b"kernal").unwrap();
    assert_eq!(store.get("mine").unwrap(), image, "only the lengths are looked at");
    let Err(Error::Damaged { problem, .. }) = image.verify() else { panic!("it verifies") };
    assert!(problem.contains("SHA-256"), "{problem}");
    fs::write(&image.kernel, b"short").unwrap();
    let Err(Error::Damaged { problem, .. }) = store.get("mine") else { panic!("it is taken for whole") };
    assert_eq!(problem, "vmlinuz has 5 bytes instead of 6");
    fs::remove_file(&image.initrd).unwrap();
    fs::write(&image.kernel, b"kernel").unwrap();
    assert!(
        matches!(store.get("mine"), Err(Error::Damaged { problem, .. }) if problem.starts_with("initrd: "))
    );
    assert_eq!(store.list(), []);
}

#[test]
fn manifest_of_another_format_counts_as_not_built() {
    let cache = tempfile::tempdir().unwrap();
    let (store, image) = store_with_import(cache.path());
    let manifest = image.kernel.with_file_name(MANIFEST);
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replace("\"format\": 1", "\"format\": 2")).unwrap();
    assert!(matches!(store.get("mine"), Err(Error::NotBuilt { .. })));
    fs::write(&manifest, &text[..text.len() / 2]).unwrap();
    assert!(matches!(store.get("mine"), Err(Error::Damaged { .. })));
    fs::write(&manifest, text.replace("\"vmlinuz\"", "\"../../k\"")).unwrap();
    assert!(
        matches!(store.get("mine"), Err(Error::Damaged { problem, .. }) if problem.contains("not a file name"))
    );
    fs::remove_file(&manifest).unwrap();
    assert!(matches!(store.get("mine"), Err(Error::NotBuilt { .. })));
}

#[test]
fn killed_build_is_no_image_and_is_removed_by_the_next() {
    let cache = tempfile::tempdir().unwrap();
    let (store, first) = store_with_import(cache.path());
    let half = store.images_dir().join(".mine@killed");
    fs::create_dir(&half).unwrap();
    fs::write(half.join("vmlinuz"), b"half a ker").unwrap();
    assert_eq!(store.list().len(), 1);
    assert_eq!(store.get("mine").unwrap(), first);
    let others = store.images_dir().join(".mine.two@build");
    fs::create_dir(&others).unwrap();

    let (_, second) = store_with_import(cache.path());
    assert!(!half.exists());
    assert!(others.exists(), "another image's build is left alone");
    assert!(first.kernel.exists(), "a reader of the generation before still opens its files");
    let (_, third) = store_with_import(cache.path());
    assert!(!first.kernel.exists() && second.kernel.exists());
    assert_eq!(store.get("mine").unwrap(), third);
}

#[test]
fn names_that_are_no_file_names_are_refused() {
    let store = Store::open(Path::new("/nonexistent"));
    for name in ["", "..", ".hidden", "a/b", "-x", "ü", &"x".repeat(65)] {
        assert!(matches!(store.get(name), Err(Error::Name(_))), "{name}");
        assert!(matches!(
            store.import(name, Path::new("k"), Path::new("i"), &mut Silent),
            Err(Error::Name(_))
        ));
    }
    assert!(matches!(
        store.build("ubuntu", &BuildOptions::default(), &mut Silent),
        Err(Error::Unknown(name)) if name == "ubuntu"
    ));
    assert!(matches!(
        store.import("debian", Path::new("k"), Path::new("i"), &mut Silent),
        Err(Error::Content { .. })
    ));
}

#[test]
fn second_builder_waits() {
    let cache = tempfile::tempdir().unwrap();
    let store = Store::open(cache.path());
    let held = store.lock("debian").unwrap();
    let other = File::open(store.images_dir().join(".debian.lock")).unwrap();
    assert!(other.try_lock().is_err(), "it is held");
    store.lock("mine").expect("another image's lock is free");
    drop(held);
    other.try_lock().expect("it went with the first builder");
}

/// Remembers what it was told.
#[derive(Default)]
struct Told {
    steps: Vec<String>,
    bytes: Vec<(u64, u64)>,
    done: Vec<String>,
}

impl Progress for Told {
    fn step(&mut self, what: &str) {
        self.steps.push(what.to_owned());
    }

    fn bytes(&mut self, done: u64, total: u64) {
        self.bytes.push((done, total));
    }

    fn done(&mut self, what: &str) {
        self.done.push(what.to_owned());
    }
}

#[test]
fn image_is_built_once_and_again_only_when_something_changed() {
    let cache = tempfile::tempdir().unwrap();
    let store = Store::open(cache.path());
    let mut told = Told::default();
    let build = |progress: &mut Told| store.build("debian", &BuildOptions::default(), progress);
    let image = match build(&mut told) {
        Err(Error::Deb(
            error @ (deb::Error::Unreachable { .. }
            | deb::Error::MissingProgram { .. }
            | deb::Error::MissingKeyring { .. }),
        )) => {
            crate::skip::skip(&error);
            return;
        }
        answer => answer.unwrap(),
    };
    let manifest = &image.manifest;
    assert!(manifest.initrd.size < 10_000_000, "{}", manifest.initrd.size);
    let kernel = manifest.kernel_package.clone().unwrap();
    assert!(kernel.package.ends_with(&kernel.release), "{kernel:?}");
    assert_eq!(&fs::read(&image.kernel).unwrap()[0x202..0x206], b"HdrS", "a bzImage");
    assert!(
        ["virtio_mmio", "virtio_net"]
            .iter()
            .all(|&name| manifest.modules.iter().any(|module| module == name))
    );
    assert!(told.steps.len() >= 3 && told.done.len() == 1, "{:?} {:?}", told.steps, told.done);
    assert!(
        told.bytes.is_sorted_by_key(|(done, _)| done) && told.bytes.iter().all(|(done, total)| done <= total)
    );

    // Nothing new: found, not built.
    let mut told = Told::default();
    assert_eq!(build(&mut told).unwrap(), image);
    assert_eq!(told.steps, [""; 0]);

    // Damaged: built again from the packages that are here, to the same bytes, without the archive.
    fs::remove_dir_all(cache.path().join("apt").join(&manifest.suite).join("lists/partial")).unwrap();
    fs::write(&image.initrd, b"?").unwrap();
    let mut told = Told::default();
    let again = build(&mut told).unwrap();
    assert_eq!(&again.manifest, manifest, "the same inputs give the same bytes");
    assert_ne!(again.initrd, image.initrd);
    assert!(!told.steps.iter().any(|step| step.contains("download")), "{:?}", told.steps);
}
