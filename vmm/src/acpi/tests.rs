//! Golden bytes of each table, and what `iasl` makes of them.

use std::fs;
use std::process::Command;

use vm_memory::Bytes;

use super::*;
use crate::memory::allocate;

const TWO_AND_TWO: Hardware = Hardware { cpus: 2, virtio_devices: 2 };

fn hex(bytes: &[u8]) -> String {
    let lines =
        bytes.chunks(16).map(|line| line.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" "));
    lines.collect::<Vec<_>>().join("\n")
}

fn table(name: &[u8]) -> Vec<u8> {
    tables(TWO_AND_TWO).into_iter().map(|t| t.bytes).find(|bytes| bytes.starts_with(name)).unwrap()
}

#[test]
fn rsdp_bytes() {
    assert_eq!(
        hex(&table(b"RSD PTR ")),
        "\
         52 53 44 20 50 54 52 20 01 50 4e 54 4f 4f 4e 02\n\
         00 00 00 00 24 00 00 00 c0 03 0e 00 00 00 00 00\n\
         0b 00 00 00"
    );
}

#[test]
fn xsdt_bytes() {
    assert_eq!(
        hex(&table(b"XSDT")),
        "\
         58 53 44 54 34 00 00 00 01 bd 50 4e 54 4f 4f 4e\n\
         50 4f 4e 54 4f 4f 4e 20 01 00 00 00 52 56 41 54\n\
         00 00 00 01 00 02 0e 00 00 00 00 00 40 03 0e 00\n\
         00 00 00 00"
    );
}

#[test]
fn fadt_bytes() {
    assert_eq!(
        hex(&table(b"FACP")),
        "\
         46 41 43 50 14 01 00 00 06 22 50 4e 54 4f 4f 4e\n\
         50 4f 4e 54 4f 4f 4e 20 01 00 00 00 52 56 41 54\n\
         00 00 00 01 00 00 00 00 00 00 00 00 00 00 00 00\n\
         00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00\n\
         00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00\n\
         00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00\n\
         00 00 00 00 00 00 00 00 00 00 00 00 32 05 00 00\n\
         30 14 10 00 01 08 00 01 02 06 00 00 00 00 00 00\n\
         01 00 00 05 00 00 00 00 00 00 00 00 40 00 0e 00\n\
         00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00\n\
         00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00\n\
         00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00\n\
         00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00\n\
         00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00\n\
         00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00\n\
         00 00 00 00 01 08 00 01 00 06 00 00 00 00 00 00\n\
         01 08 00 01 01 06 00 00 00 00 00 00 50 4f 4e 54\n\
         4f 4f 4e 00"
    );
}

#[test]
fn madt_bytes() {
    assert_eq!(
        hex(&table(b"APIC")),
        "\
         41 50 49 43 48 00 00 00 01 73 50 4e 54 4f 4f 4e\n\
         50 4f 4e 54 4f 4f 4e 20 01 00 00 00 52 56 41 54\n\
         00 00 00 01 00 00 e0 fe 00 00 00 00 00 08 00 00\n\
         01 00 00 00 00 08 01 01 01 00 00 00 01 0c 00 00\n\
         00 00 c0 fe 00 00 00 00"
    );
}

#[test]
fn dsdt_bytes() {
    assert_eq!(
        hex(&table(b"DSDT")),
        "\
         44 53 44 54 a1 01 00 00 02 ea 50 4e 54 4f 4f 4e\n\
         50 4f 4e 54 4f 4f 4e 20 01 00 00 00 52 56 41 54\n\
         00 00 00 01 08 5c 5f 53 35 5f 12 04 01 0a 05 10\n\
         41 17 5c 5f 53 42 5f 5b 82 31 43 4f 4d 31 08 5f\n\
         48 49 44 0c 41 d0 05 01 08 5f 55 49 44 00 08 5f\n\
         43 52 53 11 16 0a 13 47 01 f8 03 f8 03 01 08 89\n\
         06 00 03 01 04 00 00 00 79 00 5b 82 22 52 54 43\n\
         5f 08 5f 48 49 44 0c 41 d0 0b 00 08 5f 43 52 53\n\
         11 0d 0a 0a 47 01 70 00 70 00 01 02 79 00 5b 82\n\
         15 50 57 52 42 08 5f 48 49 44 0c 41 d0 0c 0c 08\n\
         5f 55 49 44 00 5b 82 3c 47 45 44 5f 08 5f 48 49\n\
         44 0d 41 43 50 49 30 30 31 33 00 08 5f 55 49 44\n\
         00 08 5f 43 52 53 11 0e 0a 0b 89 06 00 03 01 09\n\
         00 00 00 79 00 14 0d 5f 45 56 54 09 86 50 57 52\n\
         42 0a 80 5b 82 1a 43 30 30 30 08 5f 48 49 44 0d\n\
         41 43 50 49 30 30 30 37 00 08 5f 55 49 44 00 5b\n\
         82 1a 43 30 30 31 08 5f 48 49 44 0d 41 43 50 49\n\
         30 30 30 37 00 08 5f 55 49 44 01 5b 82 41 04 56\n\
         30 30 30 08 5f 48 49 44 0d 4c 4e 52 4f 30 30 30\n\
         35 00 08 5f 55 49 44 00 08 5f 43 43 41 01 08 5f\n\
         43 52 53 11 1a 0a 17 86 09 00 01 00 00 00 d0 00\n\
         10 00 00 89 06 00 03 01 10 00 00 00 79 00 5b 82\n\
         41 04 56 30 30 31 08 5f 48 49 44 0d 4c 4e 52 4f\n\
         30 30 30 35 00 08 5f 55 49 44 01 08 5f 43 43 41\n\
         01 08 5f 43 52 53 11 1a 0a 17 86 09 00 01 00 10\n\
         00 d0 00 10 00 00 89 06 00 03 01 11 00 00 00 79\n\
         00"
    );
}

#[test]
fn tables_sum_to_zero_and_do_not_overlap() {
    for hardware in [TWO_AND_TWO, Hardware { cpus: 254, virtio_devices: layout::MAX_VIRTIO_DEVICES }] {
        let tables = tables(hardware);
        for table in &tables {
            let sum = table.bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
            assert_eq!(sum, 0, "{:?}", &table.bytes[..4]);
        }
        for pair in tables.windows(2) {
            assert!(pair[0].at + pair[0].bytes.len() as u64 <= pair[1].at);
        }
        write(&allocate(4 << 20).unwrap(), hardware).unwrap();
    }
}

#[test]
fn the_rsdp_leads_to_every_table() {
    let memory = allocate(4 << 20).unwrap();
    write(&memory, TWO_AND_TWO).unwrap();
    let u64_at = |at: u64| memory.read_obj::<u64>(GuestAddress(at)).unwrap();
    let name_at = |at: u64| memory.read_obj::<[u8; 4]>(GuestAddress(at)).unwrap();
    let xsdt = u64_at(layout::ACPI + 24);
    assert_eq!(&name_at(xsdt), b"XSDT");
    let (fadt, madt) = (u64_at(xsdt + 36), u64_at(xsdt + 44));
    assert_eq!((&name_at(fadt), &name_at(madt)), (b"FACP", b"APIC"));
    assert_eq!(&name_at(u64_at(fadt + 140)), b"DSDT", "X_DSDT");
}

/// The disassembly of a table, or nothing when there is no `iasl`.
fn disassemble(bytes: &[u8]) -> Option<String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("table.aml");
    fs::write(&path, bytes).unwrap();
    let run = match Command::new("iasl").arg("-d").arg(&path).current_dir(dir.path()).output() {
        Ok(run) => run,
        Err(e) => {
            crate::skip::skip(format_args!("iasl does not run here ({e}); install acpica-tools"));
            return None;
        }
    };
    let said = String::from_utf8_lossy(&run.stderr).into_owned() + &String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success(), "{said}");
    assert!(!said.contains("Could not parse") && !said.contains("Error"), "{said}");
    Some(fs::read_to_string(path.with_extension("dsl")).unwrap())
}

#[test]
fn iasl_accepts_every_table() {
    for name in [b"XSDT", b"FACP", b"APIC", b"DSDT"] {
        let Some(text) = disassemble(&table(name)) else { return };
        assert!(
            !text.contains("should be") && !text.contains("Invalid") && !text.contains("Incorrect"),
            "{text}"
        );
    }
}

#[test]
fn iasl_reads_the_devices_that_we_meant() {
    let Some(text) = disassemble(&table(b"DSDT")) else { return };
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    for part in [
        "Name (\\_S5, Package (0x01)",
        "Device (COM1) { Name (_HID, EisaId (\"PNP0501\")",
        "Device (RTC) { Name (_HID, EisaId (\"PNP0B00\")",
        "Device (C001) { Name (_HID, \"ACPI0007\"",
        "Device (V001) { Name (_HID, \"LNRO0005\"",
        "Memory32Fixed (ReadWrite, 0xD0001000, // Address Base 0x00001000, // Address Length )",
        "Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, ) { 0x00000011, }",
        "Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, ) { 0x00000004, }",
    ] {
        assert!(text.contains(part), "{part} is missing in {text}");
    }
}
