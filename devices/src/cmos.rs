//! The MC146818 real-time clock and its CMOS memory at I/O ports 0x70 and 0x71.
//!
//! The clock always shows UTC, read from a clock that the VMM injects, so it needs no timer of its own and the
//! guest's time is the host's at every look. The guest may choose BCD or binary and 12 or 24 hours in status
//! register B; it may write the time registers, but the clock keeps the host's time: who sets the clock of a
//! guest is the guest's kernel. Alarms and periodic interrupts are not made; registers C and their flags read 0.
//!
//! `UIP` ("update in progress", register A bit 7) reads set for the last [`UPDATE_MICROS`] microseconds of every
//! second, as on the chip, since Linux (`mach_get_cmos_time`, `mc146818_avoid_UIP`) waits for it to fall before it
//! reads. Register D says that the battery is good. The century is in register 0x32 (FADT `CENTURY`).
//! Bytes 0x0e to 0x7f other than that are memory and start as zero.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::bus::BusDevice;
use crate::exit::ExitRequest;

/// First port of the clock.
pub const CMOS_BASE: u16 = 0x70;
/// Ports of the clock.
pub const CMOS_LEN: u16 = 2;
/// Register with the century, in the FADT.
pub const CENTURY: u8 = 0x32;
/// How long before a second changes `UIP` is set, as in the chip's data sheet (244 us before the update).
pub const UPDATE_MICROS: u32 = 244;

const SECONDS: u8 = 0;
const MINUTES: u8 = 2;
const HOURS: u8 = 4;
const WEEKDAY: u8 = 6;
const DAY: u8 = 7;
const MONTH: u8 = 8;
const YEAR: u8 = 9;
const REG_A: u8 = 0xa;
const REG_B: u8 = 0xb;
const REG_C: u8 = 0xc;
const REG_D: u8 = 0xd;

/// Register A: update in progress.
const UIP: u8 = 0x80;
/// Register A: the divider of a 32 kHz crystal and the usual rate.
const REG_A_DEFAULT: u8 = 0x26;
/// Register B: 24-hour mode.
const HOURS_24: u8 = 1 << 1;
/// Register B: binary mode.
const BINARY: u8 = 1 << 2;
/// Register B: interrupt enables; kept, never acted upon.
const HOURS_PM: u8 = 0x80;
/// Register D: RAM and time are valid.
const VALID: u8 = 0x80;

/// Where the time comes from.
///
/// ```
/// use std::time::{Duration, UNIX_EPOCH};
///
/// use devices::BusDevice;
/// use devices::cmos::{Clock, Rtc};
///
/// // A machine for which it is always 2000-02-29 12:34:56.
/// let clock: Clock = Box::new(|| UNIX_EPOCH + Duration::from_secs(951_827_696));
/// let mut rtc = Rtc::new(clock);
/// let mut day = [0];
/// rtc.write(0, &[0x07]);
/// rtc.read(1, &mut day);
/// assert_eq!(day, [0x29], "in BCD");
/// ```
pub type Clock = Box<dyn Fn() -> SystemTime + Send>;

/// A broken-down UTC time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Civil {
    year: u64,
    month: u8,
    day: u8,
    /// 1 is Sunday.
    weekday: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

impl Civil {
    /// The time `since_epoch` after 1970 (proleptic Gregorian; days counted in 400-year cycles from 1 March 0).
    fn new(since_epoch: Duration) -> Self {
        let seconds = since_epoch.as_secs();
        let (days, rest) = (seconds / 86_400, seconds % 86_400);
        let from_march_0 = days + 719_468;
        let cycle = from_march_0 / 146_097;
        let day_of_cycle = from_march_0 % 146_097;
        let year_of_cycle =
            (day_of_cycle - day_of_cycle / 1460 + day_of_cycle / 36_524 - day_of_cycle / 146_096) / 365;
        let day_of_year = day_of_cycle - (365 * year_of_cycle + year_of_cycle / 4 - year_of_cycle / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
        Self {
            year: year_of_cycle + cycle * 400 + u64::from(month <= 2),
            month: month as u8,
            day: (day_of_year - (153 * month_from_march + 2) / 5 + 1) as u8,
            weekday: ((days + 4) % 7 + 1) as u8,
            hour: (rest / 3600) as u8,
            minute: (rest / 60 % 60) as u8,
            second: (rest % 60) as u8,
        }
    }
}

/// The clock. See the module's documentation.
///
/// ```
/// use devices::BusDevice;
/// use devices::cmos::Rtc;
///
/// let mut rtc = Rtc::host();
/// // The index goes to port 0x70, the value is at port 0x71.
/// let mut register = |index| {
///     let mut value = [0];
///     rtc.write(0, &[index]);
///     rtc.read(1, &mut value);
///     value[0]
/// };
/// assert_eq!(register(0x0b), 0x02, "24 hours, BCD");
/// assert_eq!(register(0x0d), 0x80, "the battery is good");
/// assert!(register(0x32) >= 0x20, "the century");
/// ```
pub struct Rtc {
    clock: Clock,
    index: u8,
    reg_a: u8,
    reg_b: u8,
    memory: [u8; 0x80],
}

impl Rtc {
    /// A clock that shows `clock`'s time.
    pub fn new(clock: Clock) -> Self {
        Self { clock, index: 0, reg_a: REG_A_DEFAULT, reg_b: HOURS_24, memory: [0; 0x80] }
    }

    /// A clock that shows the host's time.
    pub fn host() -> Self {
        Self::new(Box::new(SystemTime::now))
    }

    fn since_epoch(&self) -> Duration {
        // A host whose clock stands before 1970 shows 1970.
        (self.clock)().duration_since(UNIX_EPOCH).unwrap_or_default()
    }

    fn encode(&self, value: u8) -> u8 {
        if self.reg_b & BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.reg_b & HOURS_24 != 0 {
            return self.encode(hour);
        }
        let twelve = if hour.is_multiple_of(12) { 12 } else { hour % 12 };
        self.encode(twelve) | if hour >= 12 { HOURS_PM } else { 0 }
    }

    fn register(&self, index: u8) -> u8 {
        let now = self.since_epoch();
        let time = Civil::new(now);
        match index {
            SECONDS => self.encode(time.second),
            MINUTES => self.encode(time.minute),
            HOURS => self.encode_hour(time.hour),
            WEEKDAY => self.encode(time.weekday),
            DAY => self.encode(time.day),
            MONTH => self.encode(time.month),
            YEAR => self.encode((time.year % 100) as u8),
            CENTURY => self.encode((time.year / 100 % 100) as u8),
            REG_A if now.subsec_micros() >= 1_000_000 - UPDATE_MICROS => self.reg_a | UIP,
            REG_A => self.reg_a,
            REG_B => self.reg_b,
            REG_C => 0,
            REG_D => VALID,
            other => self.memory[usize::from(other & 0x7f)],
        }
    }
}

impl BusDevice for Rtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        // The index port is write-only on a PC.
        if let (1, Some(byte)) = (offset, data.first_mut()) {
            *byte = self.register(self.index);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<ExitRequest> {
        let value = *data.first()?;
        match (offset, self.index) {
            // Bit 7 masks NMIs on a PC; there are none here.
            (0, _) => self.index = value & 0x7f,
            (1, REG_A) => self.reg_a = value & !UIP,
            (1, REG_B) => self.reg_b = value,
            (1, SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY | REG_C | REG_D) => {}
            (1, index) => self.memory[usize::from(index)] = value,
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(duration: Duration) -> Rtc {
        Rtc::new(Box::new(move || UNIX_EPOCH + duration))
    }

    fn get(rtc: &mut Rtc, index: u8) -> u8 {
        rtc.write(0, &[index]);
        let mut byte = [0];
        rtc.read(1, &mut byte);
        byte[0]
    }

    fn put(rtc: &mut Rtc, index: u8, value: u8) {
        rtc.write(0, &[index]);
        rtc.write(1, &[value]);
    }

    /// 2024-02-29 23:59:58 UTC, a Thursday.
    const LEAP_DAY: Duration = Duration::from_secs(1_709_251_198);

    #[test]
    fn a_leap_day_reads_in_bcd() {
        let mut rtc = at(LEAP_DAY);
        let all = [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY].map(|i| get(&mut rtc, i));
        assert_eq!(all, [0x58, 0x59, 0x23, 5, 0x29, 2, 0x24, 0x20]);
        assert_eq!(get(&mut rtc, REG_D), VALID);
    }

    #[test]
    fn binary_and_twelve_hours_are_the_guests_choice() {
        let mut rtc = at(LEAP_DAY);
        put(&mut rtc, REG_B, BINARY);
        assert_eq!([SECONDS, HOURS, YEAR].map(|i| get(&mut rtc, i)), [58, 11 | HOURS_PM, 24]);
        let mut rtc = at(Duration::from_secs(10));
        put(&mut rtc, REG_B, 0);
        assert_eq!(get(&mut rtc, HOURS), 0x12, "midnight is 12 AM");
    }

    #[test]
    fn an_update_is_in_progress_just_before_the_second_ends() {
        let before = Duration::from_micros(1_000_000 - u64::from(UPDATE_MICROS) - 1);
        assert_eq!(get(&mut at(before), REG_A) & UIP, 0);
        assert_eq!(get(&mut at(before + Duration::from_micros(1)), REG_A) & UIP, UIP);
        assert_eq!(get(&mut at(Duration::from_secs(1)), REG_A) & UIP, 0);
    }

    #[test]
    fn memory_keeps_what_is_written_and_the_time_does_not() {
        let mut rtc = at(LEAP_DAY);
        put(&mut rtc, 0x0f, 0xa5);
        put(&mut rtc, SECONDS, 1);
        assert_eq!(get(&mut rtc, 0x0f), 0xa5);
        assert_eq!(get(&mut rtc, SECONDS), 0x58);
    }

    proptest! {
        #[test]
        fn consecutive_days_follow_each_other(days in 0u64..200_000) {
            let day = |n: u64| Civil::new(Duration::from_secs(n * 86_400));
            let (today, next) = (day(days), day(days + 1));
            let leap = (today.year % 4 == 0 && today.year % 100 != 0) || today.year % 400 == 0;
            let length = [31, 28 + u8::from(leap), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
            let last = today.day == length[usize::from(today.month - 1)];
            prop_assert_eq!(next.day, if last { 1 } else { today.day + 1 });
            prop_assert_eq!(next.month, if last { today.month % 12 + 1 } else { today.month });
            prop_assert_eq!(next.year, today.year + u64::from(last && today.month == 12));
            prop_assert_eq!(next.weekday, today.weekday % 7 + 1);
        }

        #[test]
        fn any_access_is_answered(ops in prop::collection::vec((0u64..2, any::<u8>()), 0..64)) {
            let mut rtc = at(LEAP_DAY);
            for (offset, value) in ops {
                prop_assert_eq!(rtc.write(offset, &[value]), None);
                rtc.read(offset, &mut [0]);
            }
        }
    }
}
