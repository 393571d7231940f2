//! `pontoon image`: build and list guest images.

use guest_images::deb::Suite;
use guest_images::{BuildOptions, Image, KernelSource, RootfsOptions, Store, rootfs, store};
use serde_json::json;

use super::args::{ImageBuildArgs, ImageCommand, KernelChoice, RootfsArgs};
use super::{Failure, output};

pub(crate) fn image(command: ImageCommand) -> Result<u8, Failure> {
    let store = Store::open_default().map_err(Failure::usage)?;
    match command {
        ImageCommand::Build(args) => {
            let image = build(&store, &args)?;
            if args.json {
                output::json(&describe(&image));
            }
        }
        ImageCommand::Ls { json } => {
            let images = store.list();
            if json {
                output::json(&images.iter().map(describe).collect::<Vec<_>>());
            } else {
                output::table(
                    &["NAME", "SUITE", "KERNEL", "INITRD", "DISK"],
                    &images.iter().map(row).collect::<Vec<_>>(),
                );
            }
        }
    }
    Ok(0)
}

fn build(store: &Store, args: &ImageBuildArgs) -> Result<Image, Failure> {
    let suite = args.suite.as_deref().map(suite_named).transpose()?;
    let mut bar = output::Bar::new();
    if !(args.rootfs || args.image == store::ROOTFS) {
        let RootfsArgs { name, kernel, size, ssh_key, package } = &args.disk;
        let of_rootfs =
            [name.is_some(), kernel.is_some(), size.is_some(), !ssh_key.is_empty(), !package.is_empty()];
        if of_rootfs.contains(&true) {
            return Err(Failure::usage(anyhow::anyhow!(
                "--name, --kernel, --size, --ssh-key and --package are of images with a disk; add --rootfs"
            )));
        }
        let options = BuildOptions { suite, refresh: args.refresh, ..BuildOptions::default() };
        return store.build(&args.image, &options, &mut bar).map_err(build_failure);
    }
    if !["debian", store::ROOTFS].contains(&args.image.as_str()) {
        return Err(Failure::usage(store::Error::Unknown(args.image.clone())));
    }
    let mut options = RootfsOptions { suite, refresh: args.refresh, ..RootfsOptions::default() };
    options.ssh_keys.clone_from(&args.disk.ssh_key);
    options.packages.clone_from(&args.disk.package);
    if let Some(size) = args.disk.size {
        options.size = size.0;
    }
    options.kernel = match args.disk.kernel {
        None | Some(KernelChoice::Suite) => KernelSource::Suite,
        Some(KernelChoice::Backports) => KernelSource::Backports,
        Some(KernelChoice::Both) => KernelSource::Both,
    };
    let name = args.disk.name.as_deref().unwrap_or(store::ROOTFS);
    let image = store.build_rootfs(name, &options, &mut bar).map_err(build_failure)?;
    if let Some(key) = &image.manifest.identity {
        output::note(&format!("log in as root with ssh -i {}", key.display()));
    }
    Ok(image)
}

/// What the user gave or this host lacks is for the user to mend.
fn build_failure(error: store::Error) -> Failure {
    use rootfs::Error as E;
    match error {
        store::Error::Unknown(_) | store::Error::Name(_) => Failure::usage(error),
        store::Error::Rootfs(
            E::Missing { .. } | E::NoNamespace { .. } | E::Size(_) | E::PackageName(_) | E::NoKey { .. },
        ) => Failure::usage(error),
        _ => Failure::machine(error),
    }
}

fn suite_named(name: &str) -> Result<Suite, Failure> {
    Suite::ALL.into_iter().find(|suite| suite.name() == name).ok_or_else(|| {
        let known: Vec<_> = Suite::ALL.iter().map(|suite| suite.name()).collect();
        Failure::usage(anyhow::anyhow!("no suite is called '{name}'; write one of: {}", known.join(", ")))
    })
}

fn kernel_release(image: &Image) -> &str {
    image.manifest.kernel_package.as_ref().map_or("", |package| &package.release)
}

fn row(image: &Image) -> Vec<String> {
    vec![
        image.manifest.name.clone(),
        image.manifest.suite.clone(),
        kernel_release(image).to_owned(),
        format!("{:.1} MiB", image.manifest.initrd.size as f64 / f64::from(1 << 20)),
        image.manifest.disk.as_ref().map(|disk| format!("{} MiB", disk.size >> 20)).unwrap_or_default(),
    ]
}

fn describe(image: &Image) -> serde_json::Value {
    json!({
        "name": image.manifest.name,
        "suite": image.manifest.suite,
        "kernel": image.kernel,
        "kernel_release": kernel_release(image),
        "kernel_sha256": image.manifest.kernel.sha256,
        "initrd": image.initrd,
        "initrd_bytes": image.manifest.initrd.size,
        "initrd_sha256": image.manifest.initrd.sha256,
        "disk": image.disk,
        "disk_bytes": image.manifest.disk.as_ref().map(|disk| disk.size),
        "disk_sha256": image.manifest.disk.as_ref().map(|disk| &disk.sha256),
        "cmdline": image.manifest.cmdline,
        "identity": image.manifest.identity,
    })
}
