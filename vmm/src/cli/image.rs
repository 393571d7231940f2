//! `pontoon image`: build and list guest images.

use guest_images::deb::Suite;
use guest_images::{BuildOptions, Image, Store, store};
use serde_json::json;

use super::args::ImageCommand;
use super::{Failure, output};

pub(crate) fn image(command: ImageCommand) -> Result<u8, Failure> {
    let store = Store::open_default().map_err(Failure::usage)?;
    match command {
        ImageCommand::Build { name, suite, refresh, json } => {
            let suite = suite.as_deref().map(suite_named).transpose()?;
            let options = BuildOptions { suite, refresh, ..BuildOptions::default() };
            let image =
                store.build(&name, &options, &mut output::Bar::new()).map_err(|error| match error {
                    store::Error::Unknown(_) | store::Error::Name(_) => Failure::usage(error),
                    _ => Failure::machine(error),
                })?;
            if json {
                output::json(&describe(&image));
            }
        }
        ImageCommand::Ls { json } => {
            let images = store.list();
            if json {
                output::json(&images.iter().map(describe).collect::<Vec<_>>());
            } else {
                output::table(
                    &["NAME", "SUITE", "KERNEL", "INITRD"],
                    &images.iter().map(row).collect::<Vec<_>>(),
                );
            }
        }
    }
    Ok(0)
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
    })
}
